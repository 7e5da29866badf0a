"""Ranks idle no longer than they must."""

import random
from collections.abc import Sequence
from statistics import median

import pytest

from mimo_gemma4.distributed.layout import LANGUAGE
from mimo_gemma4.train.schedule import Action
from tests.schedule_lower_bound import duration, lower_bound, orders
from tests.schedule_simulator import Cost, World, simulate
from tests.schedule_worlds import colocated, pipeline, with_decoder


@pytest.mark.parametrize("stages", range(1, 9))
@pytest.mark.parametrize("microbatches", [1, 2, 3, 7, 8, 20])
@pytest.mark.parametrize("backward", [1.0, 2.0])
def test_bubble_is_that_of_1f1b(stages: int, microbatches: int, backward: float):
    world = pipeline(stages, microbatches)
    timeline = simulate(world, world.plans(), lambda action, rank: backward if action.kind == "backward" else 1.0)
    work = microbatches * (1.0 + backward)
    assert timeline.busy == [work] * stages
    assert 1 - work / timeline.seconds == pytest.approx((stages - 1) / (microbatches + stages - 1))


def cost_of(seconds: list[float], backward: float) -> Cost:
    """What passes cost: `seconds` by rank, and `backward` times as many for backward passes."""
    return lambda action, rank: seconds[rank] * (backward if action.kind.endswith("backward") else 1.0)


def random_step(
    choose: random.Random,
    stages: int,
    microbatches: int,
    encoders: Sequence[str],
    encoder_stages: int = 1,
    decoder: bool = False,
) -> tuple[World, Cost]:
    """A lane behind `encoders`, some of them frozen, perhaps with a decoder on its own rank, and what its passes cost.

    A forward pass of a stage takes 0.8 to 1.25 s, of encoders and decoders up to twice as much or next to nothing; a
    backward pass takes two to three times a forward pass.
    """
    world = pipeline(stages, microbatches, encoder_stages, **{name: choose.randint(2, 4) for name in encoders})
    world.trained_from = {name: 0 for name in encoders if choose.random() < 0.8}
    if decoder:
        world = with_decoder(world, own_rank=True)
    seconds = [0.0] * world.layout.world_size
    for name, grid in world.layout.grids.items():
        usual = 1.0 if name == LANGUAGE else choose.uniform(0.05, 1.6)
        for rank in grid.ranks:
            seconds[rank] = usual * choose.uniform(0.8, 1.25)
    return world, cost_of(seconds, choose.uniform(2.0, 3.0))


@pytest.mark.parametrize(
    ("encoder_stages", "decoder", "microbatches", "most"),
    [(1, False, (1, 30), 1.02), (3, False, (1, 30), 1.06), (1, True, (8, 30), 1.05), (1, True, (1, 7), 1.12)],
    ids=["encoders on a rank", "encoders of three stages", "a decoder", "a decoder for a few microbatches"],
)
def test_uneven_parts_take_little_more_than_the_lower_bound(
    encoder_stages: int, decoder: bool, microbatches: tuple[int, int], most: float
):
    choose = random.Random(3)
    for _ in range(60):
        encoders = ["vision", "audio"][: choose.randint(decoder, 2)]
        stages, count = choose.randint(1, 8), choose.randint(*microbatches)
        world, cost = random_step(choose, stages, count, encoders, encoder_stages, decoder)
        least = lower_bound(world, cost)
        assert least * (1.0 - 1e-9) <= simulate(world, world.plans(), cost).seconds <= most * least


@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("decoder", [False, True])
@pytest.mark.parametrize("microbatches", [2, 3])
def test_no_order_is_faster_than_the_lower_bound(stages: int, microbatches: int, decoder: bool):
    choose = random.Random(0)
    for _ in range(4):
        world, cost = random_step(choose, stages, microbatches, ["vision"], decoder=decoder)
        least, fastest = lower_bound(world, cost), min(duration(world, order, cost) for order in orders(world))
        assert least * (1.0 - 1e-9) <= fastest <= 1.02 * least


@pytest.mark.parametrize(
    ("world", "one", "other", "loss"),
    [
        # An encoder that may run one microbatch ahead: next to nothing for the stages, or as slow as they are.
        (pipeline(2, 4, vision=1), [0.05, 1.0, 1.0], [1.0, 1.0, 1.0], 8 / 7),
        # A decoder in few microbatches: quick behind a slow encoder, or as slow as the stage.
        (with_decoder(pipeline(1, 2, vision=2), own_rank=True), [1.5, 1.0, 0.05], [1.0, 1.0, 1.0], 12.0 / 10.6),
    ],
    ids=["an encoder one ahead", "a decoder for a few microbatches"],
)
def test_no_order_suits_all(world: World, one: list[float], other: list[float], loss: float):
    """Every order loses as much on one side or the other as ours, which knows no costs, does on its worse."""
    costs = [cost_of(seconds, 2.0) for seconds in (one, other)]
    times = [[duration(world, order, cost) for cost in costs] for order in orders(world)]
    times.append([simulate(world, world.plans(), cost).seconds for cost in costs])
    fastest = [min(column) for column in zip(*times, strict=True)]
    losses = [max(time / best for time, best in zip(row, fastest, strict=True)) for row in times]
    assert min(losses) == pytest.approx(loss)
    assert losses[-1] == pytest.approx(loss)


@pytest.mark.parametrize("stages", [2, 4, 8])
def test_colocated_encoders_fill_the_bubble(stages: int):
    """Encoders that work on every stage's rank, as long as the stage does, and take what they can of its idle time."""
    microbatches, seconds = 16, {"forward": 1.0, "encode": 1.0, "backward": 2.0, "encoder_backward": 2.0}
    world = colocated(stages, microbatches, run_ahead=2)
    timeline = simulate(world, world.plans(), lambda action, rank: seconds[action.kind])
    bubble, work = 3.0 * (stages - 1), 6.0 * microbatches
    assert timeline.busy == [work] * stages
    # Encoders before and after the pipeline would leave all of the bubble.
    assert timeline.seconds - work <= bubble / 2
    assert stages > 2 or timeline.seconds == work


def test_colocated_encoders_take_little_more_than_the_lower_bound():
    choose, ratios = random.Random(8), []
    for _ in range(60):
        world = colocated(choose.randint(1, 8), choose.randint(1, 30), choose.randint(2, 4))
        stages = [choose.uniform(0.8, 1.25) for _ in range(world.layout.world_size)]
        encoder, backward = choose.uniform(0.05, 1.6), choose.uniform(2.0, 3.0)
        language_cost, encoder_cost = cost_of(stages, backward), cost_of([encoder] * len(stages), backward)

        def cost(action: Action, rank: int, language: Cost = language_cost, vision: Cost = encoder_cost) -> float:
            return (language if action.module == LANGUAGE else vision)(action, rank)

        ratios.append(simulate(world, world.plans(), cost).seconds / lower_bound(world, cost))
    assert min(ratios) >= 1.0 - 1e-9
    assert median(ratios) <= 1.05 and max(ratios) <= 1.2

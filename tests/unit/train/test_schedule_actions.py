"""The action lists of all ranks do every microbatch's work once, in order, within their memory, and never deadlock.

Not even if every rank waits until what it hands over has moved (`blocking`), which is the most that any backend does.
"""

import random

import pytest

from mimo_gemma4.config import LayoutConfig, ModuleLayout
from mimo_gemma4.data.manifest import Microbatch, StepManifest
from mimo_gemma4.distributed.layout import LANGUAGE, build_layout
from mimo_gemma4.train.schedule import Action, pipeline_depth
from tests.schedule_simulator import Deadlock, Disorder, Message, World, complete, simulate
from tests.schedule_worlds import make_manifest, make_world, pipeline, with_decoder

LAYOUTS = 10_000


def test_no_layout_deadlocks_and_all_work_is_done_once_within_its_memory():
    choose = random.Random(0)
    for number in range(LAYOUTS):
        world = make_world(choose)
        plans = world.plans()
        timeline = simulate(world, plans, blocking=True)
        if number % 10 == 0:  # waiting for less, as the timelines below do
            assert simulate(world, plans).in_flight == timeline.in_flight
        depth, microbatches = pipeline_depth(world.layout), world.manifest.num_microbatches
        for rank, plan in enumerate(plans):
            if number % 10 == 0:
                counted = complete(world, rank)
                assert len(plan) == counted.total() and all(plan.count(action) == counted[action] for action in counted)
            for name in world.layout.modules_of(rank):
                most, stage = timeline.in_flight.get((rank, name), 0), world.stage(name, rank)
                if name == LANGUAGE and world.train:
                    assert most <= min(microbatches, depth - stage)
                elif name in world.layout.decoders:
                    assert most == 0
                elif world.returns(name, rank):
                    behind = world.layout.grids[name].pp - 1 - stage
                    assert most <= behind + depth - 1 + world.run_ahead[name]


@pytest.mark.parametrize("run_ahead", [1, 2, 3, 9])
def test_an_encoder_on_its_own_ranks_runs_ahead_as_far_as_allowed(run_ahead: int):
    world = pipeline(2, 8, vision=run_ahead)
    slow = simulate(world, world.plans(), lambda action, rank: 0.1 if action.module == "vision" else 1.0)
    assert slow.in_flight[0, "vision"] == min(run_ahead + 1, 8)


def test_an_encoder_without_backward_pass_runs_ahead_without_bound():
    world = pipeline(2, 8, vision=1)
    world.trained_from = {}
    assert simulate(world, world.plans()).in_flight[0, "vision"] == 8


@pytest.mark.parametrize("first", range(3))
def test_stages_of_an_encoder_before_the_first_that_trains_have_no_backward_pass(first: int):
    world = pipeline(2, 4, vision=2)
    modules = {"vision": ModuleLayout(3, pp=3), LANGUAGE: ModuleLayout(2, pp=2)}
    world.layout, world.trained_from = build_layout(modules, 5), {"vision": first}
    world.to_language, world.to_module = {}, {}
    simulate(world, world.plans())
    kinds = [{action.kind for action in plan if action.module == "vision"} for plan in world.plans()[:3]]
    for stage in range(3):
        assert ("encoder_backward" in kinds[stage]) == (stage >= first)
        assert ("post_recv_backward" in kinds[stage]) == (first <= stage < 2)
        assert ("send_backward" in kinds[stage]) == (stage > first)
        assert ("recv_soft_token_gradients" in kinds[stage]) == (stage == 2)


def decoding_cost(action: Action, rank: int) -> float:
    """Of passes that take as long as a forward pass or, backward, twice as long; encoders are quick."""
    return 0.1 if action.module == "vision" else 2.0 if action.kind == "backward" else 1.0


@pytest.mark.parametrize("stages", [1, 2, 4])
def test_a_decoder_on_its_own_rank_works_while_the_last_stage_goes_on(stages: int):
    without = pipeline(stages, 16, vision=2)
    apart, shared = (with_decoder(without, own_rank) for own_rank in (True, False))
    times = [simulate(world, world.plans(), decoding_cost) for world in (without, apart, shared)]
    language = without.layout.language.ranks
    for stage, rank in enumerate(language):
        assert times[1].in_flight[rank, LANGUAGE] == stages + 1 - stage
        assert times[2].in_flight[rank, LANGUAGE] == stages - stage
    # Apart it costs no more than the time to fill and drain a further stage, shared a pass for every microbatch.
    assert times[1].seconds <= times[0].seconds + 1.0
    assert times[2].seconds == pytest.approx(times[0].seconds + 16.0)


@pytest.mark.parametrize(
    "kind", ["send_states", "post_recv_states", "send_state_gradients", "post_recv_state_gradients"]
)
def test_an_action_of_a_decoder_left_out_is_caught(kind: str):
    world = with_decoder(pipeline(2, 4, vision=2), own_rank=True)
    plans = world.plans()
    simulate(world, plans)
    (plan,) = (plan for plan in plans if Action(kind, 3, "pixels") in plan)
    plan.remove(Action(kind, 3, "pixels"))
    with pytest.raises((Deadlock, Disorder)):
        simulate(world, plans)


@pytest.mark.parametrize("kind", ["send_states", "decode", "recv_state_gradients"])
def test_two_microbatches_of_a_decoder_swapped_are_caught(kind: str):
    world = with_decoder(pipeline(2, 6, vision=2), own_rank=True)
    plans = world.plans()
    (plan,) = (plan for plan in plans if Action(kind, 1, "pixels") in plan)
    swap(plan, Action(kind, 1, "pixels"), Action(kind, 2, "pixels"))
    with pytest.raises((Deadlock, Disorder)):
        simulate(world, plans)


def test_a_lane_that_is_empty_moves_nothing_and_still_takes_its_passes():
    world = pipeline(2, 3)
    empty = Microbatch(0, 1, 0, 0, ())
    world.manifest = StepManifest(0, 3, (*world.manifest.microbatches[:1], empty, *world.manifest.microbatches[2:]), ())
    for plan in world.plans():
        assert {action.kind for action in plan if action.microbatch == 1} == {"forward", "backward"}
    simulate(world, world.plans())


def swap(plan: list[Action], one: Action, other: Action) -> None:
    i, j = plan.index(one), plan.index(other)
    plan[i], plan[j] = plan[j], plan[i]


def language(kind: str, number: int) -> Action:
    return Action(kind, number, LANGUAGE)


@pytest.mark.parametrize(
    ("one", "other", "error"),
    [
        (Action("post_recv_soft_tokens", 1, "vision"), Action("post_recv_soft_tokens", 2, "vision"), Disorder),
        (language("send_forward", 0), language("send_forward", 1), Disorder),
        (language("forward", 1), language("forward", 2), Disorder),
    ],
    ids=["soft tokens", "hidden states", "forward"],
)
def test_two_microbatches_swapped_on_one_rank_are_caught(one: Action, other: Action, error: type[Exception]):
    world = pipeline(4, 6, vision=2)
    plans = world.plans()
    simulate(world, plans)
    swap(plans[1], one, other)
    with pytest.raises(error):
        simulate(world, plans)


def test_a_backward_pass_before_its_forerunners_deadlocks():
    world = pipeline(2, 4)
    plans = world.plans()
    for kind in ("post_recv_backward", "recv_backward"):  # the first stage asks for the gradient one forward too early
        plans[0].remove(language(kind, 0))
        plans[0].insert(plans[0].index(language("forward", 0)), language(kind, 0))
    with pytest.raises(Deadlock):
        simulate(world, plans)


@pytest.mark.parametrize("run_ahead", [1, 2, 3])
def test_room_made_a_microbatch_early_deadlocks_where_ranks_wait_for_what_they_posted(run_ahead: int):
    """CUDA loads a kernel at its first launch and waits for the device, and so for receives that are posted there."""
    world = pipeline(2, 6, vision=run_ahead)
    plans = world.plans()
    simulate(world, plans, blocking=True)
    rooms = [Action("post_recv_soft_tokens", number, "vision") for number in range(6)]
    places = [plans[1].index(room) for room in rooms]
    for place, following in zip(places, rooms[1:], strict=False):
        plans[1][place] = following
    del plans[1][places[-1]]
    plans[1].insert(0, rooms[0])
    simulate(world, plans)
    with pytest.raises(Deadlock):
        simulate(world, plans, blocking=True)


@pytest.mark.parametrize("kind", ["send_forward", "send_backward", "post_recv_forward", "post_recv_backward"])
def test_an_action_left_out_is_caught(kind: str):
    world = pipeline(3, 4)
    plans = world.plans()
    plans[1].remove(language(kind, 3))
    with pytest.raises((Deadlock, Disorder)):
        simulate(world, plans)


@pytest.mark.parametrize(
    ("kind", "rank"),
    [("send_soft_tokens", 0), ("post_recv_soft_tokens", 1), ("recv_soft_tokens", 1)]
    + [("send_soft_token_gradients", 1), ("post_recv_soft_token_gradients", 0), ("recv_soft_token_gradients", 0)],
)
def test_a_transfer_of_soft_tokens_left_out_is_caught(kind: str, rank: int):
    world = pipeline(2, 4, vision=2)
    plans = world.plans()
    plans[rank].remove(Action(kind, 3, "vision"))
    with pytest.raises((Deadlock, Disorder)):
        simulate(world, plans)


class Parted(World):
    """Ranks at both ends of an edge hand over what they receive and what they send as two batches."""

    def batch(self, action: Action, rank: int) -> tuple[tuple, set[Message]] | None:
        handed = super().batch(action, rank)
        end = {"post_recv_soft_tokens": 1, "send_soft_tokens": 0}.get(action.kind)
        if handed is None or end is None:
            return handed
        return handed[0], {message for message in handed[1] if message[end] == rank}


def test_ranks_at_both_ends_that_expect_before_they_send_deadlock():
    layout = build_layout(LayoutConfig({"vision": ModuleLayout(), LANGUAGE: ModuleLayout()}, placement="colocated"), 2)
    world = Parted(layout, make_manifest(random.Random(0), 2, 2, {"vision": 2}, gaps=0.0), run_ahead={"vision": 2})
    for number in range(2):
        world.to_language["vision", number] = [(0, 1), (1, 0)]
    plans = world.plans()
    for plan in plans:
        place = plan.index(Action("send_soft_tokens", 0, "vision"))
        plan.insert(place, Action("post_recv_soft_tokens", 0, "vision"))
    with pytest.raises(Deadlock):
        simulate(world, plans)

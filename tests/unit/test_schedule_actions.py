"""The action lists of all ranks do every round's work once, in order, within their memory, and never deadlock.

Not even if every rank waits until what it hands over has moved (`blocking`), which is the most that any backend does.
"""

import random
from dataclasses import replace

import pytest

from mimo_gemma4.config import LayoutConfig, ModuleLayout
from mimo_gemma4.data.manifest import MediaSlot, Microbatch, SampleSlot, StepManifest
from mimo_gemma4.layout import LANGUAGE, build_layout
from mimo_gemma4.schedule import Action, pipeline_depth
from tests.schedule_lower_bound import lower_bound
from tests.schedule_simulator import Deadlock, Disorder, Message, World, complete, simulate

LAYOUTS = 10_000
DECODERS = ("pixels", "codes")


def make_world(choose: random.Random) -> World:
    """A random layout of up to three encoders, two decoders and eight stages, and a step with gaps of all kinds."""
    encoders = ("vision", "audio", "video")[: choose.choice([0, 1, 1, 2, 3])]
    pp = choose.choice([1, 1, 1, 2, 2, 2, 3, 4, 8])
    tp, cp, dp = ((1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (1, 1, 3))[choose.randrange(5 if pp < 4 else 1)]
    ranks = tp * cp * dp * pp
    reads = {name: choose.choice(encoders) for name in DECODERS if encoders and choose.random() < 0.3}
    modules, module_ranks = {}, {}
    placement = choose.choice(["disjoint", "colocated", "mixed"])
    for name in (*encoders, *reads):
        module_tp, module_pp = choose.choice([1, 1, 1, 2, 4]), 1 if name in reads else choose.choice([1, 1, 2, 3])
        if placement == "colocated":
            if ranks % (module_tp * module_pp):
                module_tp = module_pp = 1
            modules[name] = ModuleLayout(tp=module_tp, pp=module_pp, reads=reads.get(name))
        else:
            module_ranks[name] = choose.randint(1, 3) * module_tp * module_pp
            modules[name] = ModuleLayout(module_ranks[name], tp=module_tp, pp=module_pp, reads=reads.get(name))
    modules[LANGUAGE] = ModuleLayout(None if placement == "colocated" else ranks, tp=tp, cp=cp, pp=pp)
    world_size = ranks + sum(module_ranks.values())
    if placement == "mixed":
        world_size = overlap(modules, choose)
    layout = build_layout(LayoutConfig(modules, placement=placement), world_size)
    rounds = choose.choice([0, 1, 1, 2, 2, 3, 4, 7])
    world = World(
        layout,
        make_manifest(choose, rounds, dp, {name: layout.grids[name].dp for name in (*encoders, *reads)}),
        {name: choose.randrange(modules[name].pp) for name in (*encoders, *reads) if choose.random() < 0.7},
        {name: choose.randint(1, 3) for name in encoders},
        train=choose.random() < 0.8,
        experts=choose.random() < 0.3,
    )
    world.observed = not world.train and choose.random() < 0.5
    for name in (*encoders, *reads):
        connect(world, name, choose)
    return world


def overlap(modules: dict[str, ModuleLayout], choose: random.Random) -> int:
    """Give every module a random list of ranks instead of their number; returns the number of ranks in use."""
    pool = range(max(module.ranks for module in modules.values()) + choose.randint(0, 3))
    lists = {name: choose.sample(pool, module.ranks) for name, module in modules.items()}
    number = {rank: position for position, rank in enumerate(sorted(set().union(*lists.values())))}
    for name, ranks in lists.items():
        modules[name].ranks = sorted(number[rank] for rank in ranks)
    return len(number)


def make_manifest(
    choose: random.Random, rounds: int, lanes: int, encoder_lanes: dict[str, int], gaps: float = 0.2
) -> StepManifest:
    """Every lane's microbatches, some of them empty, with media for some of the encoders' lanes."""
    microbatches, media = [], []
    for lane in range(lanes):
        for number in range(rounds):
            rows = 0 if choose.random() < gaps else 1
            sample = SampleSlot(0, 0, lane, number, 0, 0, 8, 8)
            microbatches.append(Microbatch(lane, number, rows, 8 * rows, (sample,) * rows))
            for name, count in encoder_lanes.items():
                for encoder_lane in range(count if rows else 0):
                    if choose.random() < 1.0 - gaps:
                        media.append(MediaSlot(name, 0, 0, 0, 2, lane, number, 0, 0, encoder_lane, 0))
    return StepManifest(0, rounds, tuple(microbatches), tuple(media))


def connect(world: World, name: str, choose: random.Random) -> None:
    """Choose which ranks of each media item's two lanes exchange its rows, and which of them its gradients."""
    source, target, stage = world.layout.grids[name], world.layout.language, world.layout.language_stage(name)
    for slot in world.manifest.media:
        if slot.modality != name:
            continue
        pairs = [
            (
                source.rank_at(tp=source_tp, dp=slot.encoder_lane, pp=source.pp - 1),
                target.rank_at(tp=tp, cp=cp, dp=slot.lane, pp=stage),
            )
            for source_tp in range(source.tp)
            for tp in range(target.tp)
            for cp in range(target.cp)
        ]
        pairs = [pair for pair in pairs if pair[0] != pair[1] and choose.random() < 0.8]
        rows = world.rows.setdefault((name, slot.microbatch), [])
        owners = world.owners.setdefault((name, slot.microbatch), [])
        rows += [pair for pair in pairs if pair not in rows]
        owners += [(t, s) for s, t in pairs if choose.random() < 0.7 and (t, s) not in owners]


def pipeline(stages: int, rounds: int, **encoders: int) -> World:
    """One lane of `stages` ranks behind encoders of a rank each, which may run ahead so far; every round has media."""
    modules = {name: ModuleLayout(1) for name in encoders} | {LANGUAGE: ModuleLayout(stages, pp=stages)}
    layout = build_layout(modules, stages + len(encoders))
    manifest = make_manifest(random.Random(0), rounds, 1, dict.fromkeys(encoders, 1), gaps=0.0)
    world = World(layout, manifest, dict.fromkeys(encoders, 0), encoders)
    for name in encoders:
        pair = layout.grids[name].ranks[0], layout.language.ranks[0]
        for number in range(rounds):
            world.rows[name, number], world.owners[name, number] = [pair], [pair[::-1]]
    return world


def test_no_layout_deadlocks_and_all_work_is_done_once_within_its_memory():
    choose = random.Random(0)
    for number in range(LAYOUTS):
        world = make_world(choose)
        plans = world.plans()
        timeline = simulate(world, plans, blocking=True)
        if number % 10 == 0:  # waiting for less, as the timelines below do
            assert simulate(world, plans).in_flight == timeline.in_flight
        depth, rounds = pipeline_depth(world.layout), world.manifest.rounds
        for rank, plan in enumerate(plans):
            if number % 10 == 0:
                counted = complete(world, rank)
                assert len(plan) == counted.total() and all(plan.count(action) == counted[action] for action in counted)
            for name in world.layout.modules_of(rank):
                most, stage = timeline.in_flight.get((rank, name), 0), world.stage(name, rank)
                if name == LANGUAGE and world.train:
                    assert most <= min(rounds, depth - stage)
                elif name in world.layout.decoders:
                    assert most == 0
                elif world.returns(name, rank):
                    behind = world.layout.grids[name].pp - 1 - stage
                    assert most <= behind + depth - 1 + world.run_ahead[name]


@pytest.mark.parametrize("stages", range(1, 9))
@pytest.mark.parametrize("rounds", [1, 2, 3, 7, 8, 20])
@pytest.mark.parametrize("backward", [1.0, 2.0])
def test_bubble_is_that_of_1f1b(stages: int, rounds: int, backward: float):
    world = pipeline(stages, rounds)
    timeline = simulate(world, world.plans(), lambda action, rank: backward if action.kind == "backward" else 1.0)
    work = rounds * (1.0 + backward)
    assert timeline.busy == [work] * stages
    assert 1 - work / timeline.seconds == pytest.approx((stages - 1) / (rounds + stages - 1))


def near_lower_bound(layouts: int, stage_speeds: tuple[float, float], encoder_seconds: tuple[float, float]) -> float:
    """The largest ratio of a simulated step to its lower bound, over layouts of parts with random speeds.

    A language stage's forward pass takes about a second, and a backward pass two to three times a forward pass.
    """
    choose, worst = random.Random(3), 1.0
    for _ in range(layouts):
        encoders = {name: choose.randint(2, 4) for name in choose.sample(["vision", "audio"], choose.randint(0, 2))}
        world = pipeline(choose.randint(1, 8), choose.randint(1, 30), **encoders)
        seconds = [choose.uniform(*encoder_seconds) for _ in encoders]
        seconds += [choose.uniform(*stage_speeds) for _ in range(world.layout.language.pp)]
        back = choose.uniform(2.0, 3.0)

        def cost(action: Action, rank: int, seconds: list[float] = seconds, back: float = back) -> float:
            return seconds[rank] * (back if action.kind.endswith("backward") else 1.0)

        ratio = simulate(world, world.plans(), cost).seconds / lower_bound(world, cost)
        assert ratio >= 1.0 - 1e-9  # it is a bound
        worst = max(worst, ratio)
    return worst


def test_balanced_stages_behind_fast_encoders_are_within_5_percent_of_the_lower_bound():
    assert near_lower_bound(120, (0.95, 1.05), (0.05, 0.9)) <= 1.05


def test_unbalanced_parts_stay_within_20_percent_of_it():
    assert 1.05 < near_lower_bound(120, (0.8, 1.25), (0.05, 2.0)) <= 1.2


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
    world.rows, world.owners = {}, {}
    simulate(world, world.plans())
    kinds = [{action.kind for action in plan if action.module == "vision"} for plan in world.plans()[:3]]
    for stage in range(3):
        assert ("encoder_backward" in kinds[stage]) == (stage >= first)
        assert ("expect_gradient" in kinds[stage]) == (first <= stage < 2)
        assert ("send_gradient" in kinds[stage]) == (stage > first)
        assert ("receive_row_gradients" in kinds[stage]) == (stage == 2)


def with_decoder(world: World, own_rank: bool) -> World:
    """`world`, and a decoder of a rank, its own or that of the last stage, which reads every round's media."""
    grid, rounds = world.layout.language, world.manifest.rounds
    rank = world.layout.world_size if own_rank else grid.ranks[-1]
    decoder = replace(world.layout.grids["vision"], name="pixels", ranks=(rank,), reads="vision")
    layout = replace(
        world.layout, grids=world.layout.grids | {"pixels": decoder}, world_size=world.layout.world_size + own_rank
    )
    media = tuple(replace(slot, modality="pixels") for slot in world.manifest.media)
    manifest = replace(world.manifest, media=world.manifest.media + media)
    pairs = [(rank, grid.ranks[-1])] if own_rank else []
    rows = world.rows | {("pixels", number): pairs for number in range(rounds)}
    owners = world.owners | {("pixels", number): [pair[::-1] for pair in pairs] for number in range(rounds)}
    trained_from = world.trained_from | {"pixels": 0}
    return replace(world, layout=layout, manifest=manifest, trained_from=trained_from, rows=rows, owners=owners)


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
    # Apart it costs no more than the steps that a further stage fills and drains in, shared a pass in every round.
    assert times[1].seconds <= times[0].seconds + 1.0
    assert times[2].seconds == pytest.approx(times[0].seconds + 16.0)


@pytest.mark.parametrize("kind", ["send_states", "expect_states", "send_state_gradients", "expect_state_gradients"])
def test_an_action_of_a_decoder_left_out_is_caught(kind: str):
    world = with_decoder(pipeline(2, 4, vision=2), own_rank=True)
    plans = world.plans()
    simulate(world, plans)
    (plan,) = (plan for plan in plans if Action(kind, 3, "pixels") in plan)
    plan.remove(Action(kind, 3, "pixels"))
    with pytest.raises((Deadlock, Disorder)):
        simulate(world, plans)


@pytest.mark.parametrize("kind", ["send_states", "decode", "receive_state_gradients"])
def test_two_rounds_of_a_decoder_swapped_are_caught(kind: str):
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
        assert {action.kind for action in plan if action.round == 1} == {"forward", "backward"}
    simulate(world, world.plans())


@pytest.mark.parametrize("stages", [2, 4, 8])
def test_colocated_encoders_fill_the_bubble(stages: int):
    """Encoders that work on every stage's rank, as long as the stage does, and take what they can of its idle time."""
    rounds, seconds = 16, {"forward": 1.0, "encode": 1.0, "backward": 2.0, "encoder_backward": 2.0}
    modules = {"vision": ModuleLayout(), LANGUAGE: ModuleLayout(pp=stages)}
    layout = build_layout(LayoutConfig(modules, placement="colocated"), stages)
    manifest = make_manifest(random.Random(0), rounds, 1, {"vision": stages}, gaps=0.0)
    world = World(layout, manifest, {"vision": 0}, {"vision": 2})
    for number in range(rounds):
        world.rows["vision", number] = [(rank, 0) for rank in range(1, stages)]
        world.owners["vision", number] = [(0, rank) for rank in range(1, stages)]
    timeline = simulate(world, world.plans(), lambda action, rank: seconds[action.kind])
    bubble, work = 3.0 * (stages - 1), 6.0 * rounds
    assert timeline.busy == [work] * stages
    # Encoders before and after the pipeline would leave all of the bubble.
    assert timeline.seconds - work <= bubble / 2
    assert stages > 2 or timeline.seconds == work


def swap(plan: list[Action], one: Action, other: Action) -> None:
    i, j = plan.index(one), plan.index(other)
    plan[i], plan[j] = plan[j], plan[i]


def language(kind: str, round_: int) -> Action:
    return Action(kind, round_, LANGUAGE)


@pytest.mark.parametrize(
    ("one", "other", "error"),
    [
        (Action("expect_rows", 1, "vision"), Action("expect_rows", 2, "vision"), Disorder),
        (language("send_hidden", 0), language("send_hidden", 1), Disorder),
        (language("forward", 1), language("forward", 2), Disorder),
    ],
    ids=["rows", "hidden states", "forward"],
)
def test_two_rounds_swapped_on_one_rank_are_caught(one: Action, other: Action, error: type[Exception]):
    world = pipeline(4, 6, vision=2)
    plans = world.plans()
    simulate(world, plans)
    swap(plans[1], one, other)
    with pytest.raises(error):
        simulate(world, plans)


def test_a_backward_pass_before_its_forerunners_deadlocks():
    world = pipeline(2, 4)
    plans = world.plans()
    for kind in ("expect_gradient", "receive_gradient"):  # the first stage asks for the gradient one forward too early
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
    rooms = [Action("expect_rows", number, "vision") for number in range(6)]
    places = [plans[1].index(room) for room in rooms]
    for place, following in zip(places, rooms[1:], strict=False):
        plans[1][place] = following
    del plans[1][places[-1]]
    plans[1].insert(0, rooms[0])
    simulate(world, plans)
    with pytest.raises(Deadlock):
        simulate(world, plans, blocking=True)


@pytest.mark.parametrize("kind", ["send_hidden", "send_gradient", "expect_hidden", "expect_gradient"])
def test_an_action_left_out_is_caught(kind: str):
    world = pipeline(3, 4)
    plans = world.plans()
    plans[1].remove(language(kind, 3))
    with pytest.raises((Deadlock, Disorder)):
        simulate(world, plans)


@pytest.mark.parametrize(
    ("kind", "rank"),
    [("send_rows", 0), ("expect_rows", 1), ("receive_rows", 1)]
    + [("send_row_gradients", 1), ("expect_row_gradients", 0), ("receive_row_gradients", 0)],
)
def test_a_transfer_of_rows_left_out_is_caught(kind: str, rank: int):
    world = pipeline(2, 4, vision=2)
    plans = world.plans()
    plans[rank].remove(Action(kind, 3, "vision"))
    with pytest.raises((Deadlock, Disorder)):
        simulate(world, plans)


class Parted(World):
    """Ranks at both ends of an edge hand over what they receive and what they send as two batches."""

    def batch(self, action: Action, rank: int) -> tuple[tuple, set[Message]] | None:
        handed = super().batch(action, rank)
        end = {"expect_rows": 1, "send_rows": 0}.get(action.kind)
        if handed is None or end is None:
            return handed
        return handed[0], {message for message in handed[1] if message[end] == rank}


def test_ranks_at_both_ends_that_expect_before_they_send_deadlock():
    layout = build_layout(LayoutConfig({"vision": ModuleLayout(), LANGUAGE: ModuleLayout()}, placement="colocated"), 2)
    world = Parted(layout, make_manifest(random.Random(0), 2, 2, {"vision": 2}, gaps=0.0), run_ahead={"vision": 2})
    for number in range(2):
        world.rows["vision", number] = [(0, 1), (1, 0)]
    plans = world.plans()
    for plan in plans:
        place = plan.index(Action("send_rows", 0, "vision"))
        plan.insert(place, Action("expect_rows", 0, "vision"))
    with pytest.raises(Deadlock):
        simulate(world, plans)

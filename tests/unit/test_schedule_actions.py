"""The action lists of all ranks do every round's work once, in order, with bounded run-ahead, and never deadlock.

Messages are simulated as strictly as any backend treats them: each edge and direction is one communicator per rank that
carries one batch of sends and receives after the other; a message moves once it heads the queue at both ends; a rank
that receives goes on when its whole batch has moved. (gloo, whose sends leave at once, waits for less.)
"""

import random
from collections import Counter
from dataclasses import dataclass, field

import pytest

from mimo_gemma4.schedule import Action, plan_step

KINDS = ("encode", "transfer", "language", "return", "encoder_backward")
Message = tuple[int, int]
"""Sender and receiver, as ranks."""


@dataclass
class World:
    """Who holds what, and which pairs of ranks exchange rows in which round of which edge."""

    held: list[frozenset[str]]
    encoders: tuple[str, ...]
    trainable: frozenset[str]
    rounds: int
    run_ahead: int
    train: bool = True
    rows: dict[tuple[str, int], list[Message]] = field(default_factory=dict)
    """(edge, round) → pairs (encoder rank, language rank) that rows travel between; empty rounds are normal."""
    owners: dict[tuple[str, int], list[Message]] = field(default_factory=dict)
    """The same for gradients, from language rank to encoder rank: a part of those pairs, as replicas return nothing."""

    def plan(self) -> list[list[Action]]:
        return [
            plan_step(self.rounds, self.encoders, held, self.trainable, self.run_ahead, self.train)
            for held in self.held
        ]

    def messages(self, action: Action) -> list[Message]:
        if action.kind not in ("transfer", "return"):
            return []
        return (self.rows if action.kind == "transfer" else self.owners).get((action.module, action.round), [])


def make_world(choose: random.Random) -> World:
    encoders = ("vision", "audio", "video")[: choose.randint(0, 3)]
    placement = choose.choice(["disjoint", "colocated", "mixed"])
    grids: list[frozenset[str]] = []
    for name in (*encoders, "language"):
        grids += [frozenset({name})] * choose.randint(1, 2)
    if placement == "colocated":
        grids = [frozenset({*encoders, "language"})] * choose.randint(1, 4)
    if placement == "mixed":
        grids += [frozenset(choose.sample((*encoders, "language"), choose.randint(1, len(encoders) + 1)))]
    choose.shuffle(grids)
    world = World(
        grids,
        encoders,
        frozenset(name for name in encoders if choose.random() < 0.7),
        rounds=choose.randint(0, 6),
        run_ahead=choose.randint(1, 4),
        train=choose.random() < 0.8,
    )
    density = choose.choice([0.2, 0.7, 1.0])
    for name in encoders:
        for round_ in range(world.rounds):
            pairs = [
                (source, target)
                for source, at_source in enumerate(grids)
                for target, at_target in enumerate(grids)
                if name in at_source and "language" in at_target and source != target and choose.random() < density
            ]
            world.rows[name, round_] = pairs
            world.owners[name, round_] = [(t, s) for s, t in pairs if choose.random() < 0.7]
    return world


@dataclass
class Batch:
    """Messages of one action that have not moved yet."""

    round: int
    left: set[Message]


def simulate(world: World, plans: list[list[Action]]) -> None:
    """Run all ranks. Raises `RuntimeError` for a deadlock, `ValueError` for rows that meet those of another round."""
    queues: dict[tuple[str, str], list[list[Batch]]] = {
        (module, kind): [[] for _ in plans] for module in world.encoders for kind in ("transfer", "return")
    }
    places: list[int] = [0] * len(plans)
    awaited = [Batch(0, set()) for _ in plans]
    moving = True
    while moving:
        moving = False
        for rank, plan in enumerate(plans):
            while not awaited[rank].left and places[rank] < len(plan):
                action = plan[places[rank]]
                places[rank], moving = places[rank] + 1, True
                batch = Batch(action.round, {message for message in world.messages(action) if rank in message})
                if batch.left:
                    queues[action.module, action.kind][rank].append(batch)
                if any(target == rank for _, target in batch.left):
                    awaited[rank] = batch
        for communicator in queues.values():
            moving |= move(communicator)
    if any(place < len(plan) for place, plan in zip(places, plans, strict=True)):
        raise RuntimeError(f"deadlock: ranks stopped at {places} of {[len(plan) for plan in plans]}")
    if any(queue for communicator in queues.values() for queue in communicator):
        raise RuntimeError("rows were sent that nobody received")


def move(queues: list[list[Batch]]) -> bool:
    """Move what heads the queues at both of its ends; whether anything moved."""
    moved = False
    for rank, queue in enumerate(queues):
        for message in list(queue[0].left) if queue else []:
            peer = queues[message[1] if message[0] == rank else message[0]]
            if peer and message in peer[0].left:
                if peer[0].round != queue[0].round:
                    raise ValueError(f"rows of round {queue[0].round} meet those of round {peer[0].round}")
                peer[0].left.discard(message)
                queue[0].left.discard(message)
                moved = True
                if not peer[0].left:
                    peer.pop(0)
        if queue and not queue[0].left:
            queue.pop(0)
    return moved


def positions(plan: list[Action]) -> dict[tuple[str, str, int], int]:
    return {(action.kind, action.module, action.round): place for place, action in enumerate(plan)}


def test_no_layout_deadlocks_and_rows_meet_their_own_round():
    choose = random.Random(0)
    for _ in range(3000):
        world = make_world(choose)
        simulate(world, world.plan())


def test_every_round_is_encoded_moved_trained_and_returned_once():
    choose = random.Random(1)
    for _ in range(500):
        world = make_world(choose)
        for held, plan in zip(world.held, world.plan(), strict=True):
            expected = Counter[Action]()
            for round_ in range(world.rounds):
                if "language" in held:
                    expected[Action("language", round_, "language")] += 1
                for name in world.encoders:
                    touched, returned = name in held or "language" in held, world.train and name in world.trainable
                    expected[Action("encode", round_, name)] += name in held
                    expected[Action("transfer", round_, name)] += touched
                    expected[Action("return", round_, name)] += touched and returned
                    expected[Action("encoder_backward", round_, name)] += name in held and returned
            assert Counter(plan) == +expected


def test_what_a_round_needs_comes_before_it():
    choose = random.Random(2)
    for _ in range(500):
        world = make_world(choose)
        for plan in world.plan():
            place = positions(plan)
            for name in world.encoders:
                for round_ in range(world.rounds):
                    steps = [place.get((kind, "language" if kind == "language" else name, round_)) for kind in KINDS]
                    present = [step for step in steps if step is not None]
                    assert present == sorted(present)
            for kind in KINDS:
                for name in (*world.encoders, "language"):
                    rounds = [action.round for action in plan if (action.kind, action.module) == (kind, name)]
                    assert rounds == sorted(rounds)


@pytest.mark.parametrize("run_ahead", [1, 2, 3, 9])
def test_an_encoder_on_its_own_ranks_runs_ahead_as_far_as_allowed(run_ahead: int):
    assert most_outstanding(frozenset({"vision"}), run_ahead) == min(run_ahead, 6)


@pytest.mark.parametrize("run_ahead", [1, 2, 9])
def test_a_rank_that_shares_its_modules_finishes_each_round_before_the_next(run_ahead: int):
    assert most_outstanding(frozenset({"vision", "language"}), run_ahead) == 1


def most_outstanding(held: frozenset[str], run_ahead: int) -> int:
    """The most encoder outputs that are kept for their backward pass at one time, in a step of six rounds."""
    outstanding, most = 0, 0
    for action in plan_step(6, ("vision",), held, frozenset({"vision"}), run_ahead):
        outstanding += (action.kind == "encode") - (action.kind == "encoder_backward")
        most = max(most, outstanding)
    return most


@pytest.mark.parametrize("swapped", ["transfer", "return"])
def test_a_rank_that_swaps_two_rounds_is_caught(swapped: str):
    world = World(
        [frozenset({"vision"}), frozenset({"language"}), frozenset({"language"})],
        ("vision",),
        frozenset({"vision"}),
        rounds=4,
        run_ahead=2,
        rows={("vision", round_): [(0, 1), (0, 2)] for round_ in range(4)},
        owners={("vision", round_): [(1, 0), (2, 0)] for round_ in range(4)},
    )
    plans = world.plan()
    simulate(world, plans)
    place = positions(plans[0])
    one, other = (place[swapped, "vision", round_] for round_ in (1, 2))
    plans[0][one], plans[0][other] = plans[0][other], plans[0][one]
    with pytest.raises(ValueError, match="rows of round . meet those of round ."):
        simulate(world, plans)


def test_a_gradient_that_is_never_returned_deadlocks():
    world = World(
        [frozenset({"vision"}), frozenset({"language"})],
        ("vision",),
        frozenset({"vision"}),
        rounds=2,
        run_ahead=2,
        rows={("vision", round_): [(0, 1)] for round_ in range(2)},
        owners={("vision", round_): [(1, 0)] for round_ in range(2)},
    )
    plans = world.plan()
    plans[1] = [action for action in plans[1] if action != Action("return", 1, "vision")]
    with pytest.raises(RuntimeError, match="deadlock"):
        simulate(world, plans)

"""Runs the action lists of all ranks against each other and times them.

Each edge, pipeline and direction is one communicator per rank that carries one batch of sends and receives after the
other. A message moves once its batch heads the queue at both ends; a rank goes on when the batch that it waits for has
moved. (gloo, whose sends leave at once, waits for less.) Passes of ranks that hold parts of one module are collectives.

Blocking, a rank goes on only when what it handed over has moved, receives included. No backend does more: a host that
waits for all of its device, as CUDA makes it when a kernel is loaded, waits for the receives that it has posted.
"""

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product

from mimo_gemma4.data.manifest import StepManifest
from mimo_gemma4.distributed.layout import LANGUAGE, Coordinate, Layout
from mimo_gemma4.train.schedule import Action, plan_step

Message = tuple[int, int]
"""Sender and receiver, as ranks."""
PASSES = ("forward", "backward", "encode", "encoder_backward", "decode")
COLLECTIVES = (*PASSES, "observe")
Cost = Callable[[Action, int], float]
"""Seconds that an action takes on a rank."""


class Deadlock(Exception):
    """Ranks wait for one another for ever."""


class Disorder(Exception):
    """An action comes before what it needs, or tensors of two microbatches meet."""


@dataclass
class World:
    """A step on a layout, and which pairs of ranks exchange soft tokens of which microbatch over which edge."""

    layout: Layout
    manifest: StepManifest
    trained_from: dict[str, int] = field(default_factory=dict)
    run_ahead: dict[str, int] = field(default_factory=dict)
    train: bool = True
    observed: bool = False
    experts: bool = False
    """Whether lanes share experts, so that their passes are one collective."""
    to_language: dict[tuple[str, int], list[Message]] = field(default_factory=dict)
    """(module, microbatch) → pairs (module's rank, language rank) that an encoder's soft tokens, or the gradients of a
    decoder's states, travel between."""
    to_module: dict[tuple[str, int], list[Message]] = field(default_factory=dict)
    """The same for what language ranks send, gradients of soft tokens, and states: at most those pairs, turned
    round."""

    def plans(self) -> list[list[Action]]:
        return [
            plan_step(
                self.layout,
                self.manifest,
                rank,
                trained_from=self.trained_from,
                run_ahead=self.run_ahead,
                train=self.train,
                observed=self.observed,
            )
            for rank in range(self.layout.world_size)
        ]

    @cached_property
    def places(self) -> dict[tuple[str, int], Coordinate]:
        """Coordinates of a module's ranks."""
        grids = self.layout.grids.items()
        return {(name, rank): grid.coordinate(rank) for name, grid in grids for rank in grid.ranks}

    def stage(self, module: str, rank: int) -> int:
        """The stage of a module that a rank holds."""
        return self.places[module, rank].pp

    def first(self, module: str, rank: int) -> bool:
        return self.stage(module, rank) == 0

    def last(self, module: str, rank: int) -> bool:
        return self.stage(module, rank) == self.layout.grids[module].pp - 1

    def neighbour(self, module: str, rank: int, step: int) -> int:
        """The rank of the same lane in the next (1) or previous (-1) stage of a module."""
        grid = self.layout.grids[module]
        at = self.places[module, rank]
        return grid.rank_at(tp=at.tp, cp=at.cp, dp=at.dp, pp=at.pp + step)

    def works(self, module: str, rank: int, number: int) -> bool:
        """Whether a module's lane, of which a rank holds a stage, has work in a microbatch."""
        lane = self.places[module, rank].dp
        if module == LANGUAGE:
            return self.manifest.microbatch(lane, number).sequences > 0
        return bool(self.manifest.items_of_module(module, number, lane))

    def returns(self, module: str, rank: int) -> bool:
        """Whether the stage of a module that a rank holds has a backward pass."""
        if module == LANGUAGE or not self.train:
            return self.train
        return module in self.trained_from and self.stage(module, rank) >= self.trained_from[module]

    def ends(self, encoder: str, rank: int) -> tuple[bool, bool]:
        """Whether a rank is at the encoder's, and at the language model's, end of an edge."""
        grid = self.layout.grids[encoder]
        return rank in grid.stage_ranks(grid.pp - 1), rank in self.layout.language.stage_ranks(0)

    def encodes(self, encoder: str, rank: int, number: int) -> bool:
        """Whether a rank has soft tokens to send."""
        return self.ends(encoder, rank)[0] and self.works(encoder, rank, number)

    def awaits(self, encoder: str, rank: int, number: int) -> bool:
        """Whether a rank's lane has soft tokens to receive."""
        language = self.layout.language
        lane = self.places[LANGUAGE, rank].dp if rank in language.stage_ranks(0) else None
        return lane is not None and bool(self.manifest.items_of_lane(encoder, number, lane))

    def decodes(self, decoder: str, rank: int, number: int) -> bool:
        return rank in self.layout.grids[decoder] and self.works(decoder, rank, number)

    def at_last_stage(self, rank: int) -> bool:
        return rank in self.layout.language and self.last(LANGUAGE, rank)

    def gives(self, decoder: str, rank: int, number: int) -> bool:
        lane = self.places[LANGUAGE, rank].dp if self.at_last_stage(rank) else None
        return lane is not None and bool(self.manifest.items_of_lane(decoder, number, lane))

    def team(self, action: Action, rank: int) -> tuple[tuple, int]:
        """Whose collective an action is: a name and the number of ranks."""
        grid = self.layout.grids[action.module]
        at = self.places[action.module, rank]
        if action.module == LANGUAGE:
            lanes = grid.dp if self.experts else 1
            if action.kind == "observe":  # answers go through the stages again and back to all of them
                return ("pipeline", -1 if self.experts else at.dp), grid.tp * grid.cp * grid.pp * lanes
            return ("stage", at.pp, -1 if self.experts else at.dp), grid.tp * grid.cp * lanes
        return ("encoder", action.module, at.dp, at.pp), grid.tp

    def batch(self, action: Action, rank: int) -> tuple[tuple, set[Message]] | None:
        """Communicator and messages that an action hands to it."""
        sends, what = action.kind.startswith("send_"), action.kind.removeprefix("post_recv_").removeprefix("send_")
        if not sends and not action.kind.startswith("post_recv_"):
            return None
        if what not in ("forward", "backward"):
            to_language = what in ("soft_tokens", "state_gradients")
            pairs = (self.to_language if to_language else self.to_module).get((action.module, action.microbatch), [])
            return (what, action.module), {pair for pair in pairs if rank in pair}
        peer = self.neighbour(action.module, rank, 1 if sends == (what == "forward") else -1)
        return (what, action.module), {(rank, peer) if sends else (peer, rank)}


@dataclass
class Batch:
    """Messages of one action that have not moved yet."""

    microbatch: int
    posted: float
    left: set[Message]
    finished: float = 0.0


@dataclass(frozen=True)
class Timeline:
    """What a simulation found out."""

    seconds: float
    busy: list[float]
    """Per rank, seconds in passes."""
    in_flight: dict[tuple[int, str], int]
    """(rank, module) → the most microbatches that wait for their backward pass at one time."""


def simulate(
    world: World, plans: list[list[Action]], cost: Cost = lambda action, rank: 1.0, blocking: bool = False
) -> Timeline:
    """Run all ranks. Raises `Deadlock` or `Disorder`.

    `blocking`: a rank goes on when what it handed over has moved, as if its host waited for its device all the time.
    """
    return _Simulation(world, plans, cost, blocking).run()


class _Simulation:
    def __init__(self, world: World, plans: list[list[Action]], cost: Cost, blocking: bool):
        self.world, self.plans, self.cost, self.blocking = world, plans, cost, blocking
        count = len(plans)
        self.place, self.clock, self.busy = [0] * count, [0.0] * count, [0.0] * count
        self.done: list[set[Action]] = [set() for _ in plans]
        self.awaited: list[Batch | None] = [None] * count
        self.posted: list[dict[tuple, Batch]] = [{} for _ in plans]
        self.queues: dict[tuple, dict[int, deque[Batch]]] = defaultdict(lambda: defaultdict(deque))
        self.arrivals: dict[tuple, list[int]] = defaultdict(list)
        self.in_flight: Counter[tuple[int, str]] = Counter()
        self.most: dict[tuple[int, str], int] = defaultdict(int)

    def run(self) -> Timeline:
        runnable = deque(range(len(self.plans)))
        while runnable:
            rank = runnable.popleft()
            touched: set[tuple] = set()
            freed: set[int] = set()
            while self._step(rank, touched, freed):
                pass
            for communicator in touched:
                freed |= self._move(communicator, rank)
            runnable.extend(freed)
        if any(place < len(plan) for place, plan in zip(self.place, self.plans, strict=True)):
            raise Deadlock(f"ranks stopped at {self.place} of {[len(plan) for plan in self.plans]}")
        if any(queue for communicator in self.queues.values() for queue in communicator.values()):
            raise Disorder("something was sent that nobody received")
        return Timeline(max(self.clock, default=0.0), self.busy, dict(self.most))

    def _step(self, rank: int, touched: set[tuple], freed: set[int]) -> bool:
        """Do the rank's next action; whether it could be done."""
        batch = self.awaited[rank]
        if batch is not None:
            if batch.left:
                return False
            self.clock[rank], self.awaited[rank] = max(self.clock[rank], batch.finished), None
        if self.place[rank] == len(self.plans[rank]):
            return False
        action = self.plans[rank][self.place[rank]]
        self._check(action, rank)
        if action.kind in COLLECTIVES:
            return self._collective(action, rank, freed)
        handed = self.world.batch(action, rank)
        if handed is not None:
            communicator, messages = handed
            batch = Batch(action.microbatch, self.clock[rank], set(messages), self.clock[rank])
            if messages:
                self.queues[communicator][rank].append(batch)
                touched.add(communicator)
            if action.kind not in ("send_forward", "send_backward"):  # nothing arrives with these
                self.posted[rank][*communicator, action.microbatch] = batch
            if self.blocking:
                self.awaited[rank] = batch
        elif action.waits:
            self.awaited[rank] = self.posted[rank][action.kind.removeprefix("recv_"), action.module, action.microbatch]
        self._finish(action, rank)
        return True

    def _collective(self, action: Action, rank: int, freed: set[int]) -> bool:
        """A pass begins when the last rank of its team has come to it."""
        team, size = self.world.team(action, rank)
        here = self.arrivals[team, action]
        if rank not in here:
            here.append(rank)
        if len(here) < size:
            return False
        start = max(self.clock[member] for member in here)
        for member in here:
            seconds = self.cost(action, member)
            self.clock[member], self.busy[member] = start + seconds, self.busy[member] + seconds
            if action.kind in PASSES:
                key = member, action.module
                self.in_flight[key] += {"forward": 1, "encode": 1, "decode": 0}.get(action.kind, -1)
                self.most[key] = max(self.most[key], self.in_flight[key])
            self._finish(action, member)
        freed |= set(here) - {rank}
        return True

    def _finish(self, action: Action, rank: int) -> None:
        self.done[rank].add(action)
        self.place[rank] += 1

    def _check(self, action: Action, rank: int) -> None:
        missing = [need for need in needs(self.world, action, rank) if need not in self.done[rank]]
        if missing:
            raise Disorder(f"rank {rank}: {action} before {missing}")

    def _move(self, communicator: tuple, start: int) -> set[int]:
        """Move what heads the queues at both of its ends, after `start`'s queue grew; the ranks that this freed."""
        queues, freed, changed = self.queues[communicator], set(), [start]
        while changed:
            rank = changed.pop()
            for message in list(queues[rank][0].left) if queues[rank] else []:
                ends = [queues[end] for end in message]
                if not all(end and message in end[0].left for end in ends):
                    continue
                one, other = ends[0][0], ends[1][0]
                if one.microbatch != other.microbatch:
                    raise Disorder(f"microbatch {one.microbatch} meets microbatch {other.microbatch} on {communicator}")
                when = max(one.posted, other.posted)
                for batch in (one, other):
                    batch.left.discard(message)
                    batch.finished = max(batch.finished, when)
                freed |= set(message)
            for end in {rank, *freed}:
                if queues[end] and not queues[end][0].left:
                    _leave(queues[end])
                    changed.append(end)
        return freed


def _leave(queue: deque[Batch]) -> None:
    """The head leaves; the one behind it moves no earlier."""
    gone = queue.popleft()
    if queue:
        queue[0].posted = max(queue[0].posted, gone.finished)


def needs(world: World, action: Action, rank: int) -> Iterator[Action]:
    """What has to be done on the same rank before an action."""
    name, number = action.module, action.microbatch
    if name in world.layout.decoders:
        yield from _decoder_needs(world, action, rank)
        return
    forward, backward = passes_of(name)

    def need(kind: str, module: str = name) -> Action:
        return Action(kind, number, module)  # type: ignore[arg-type]

    if action.kind == forward:
        if world.works(name, rank, number) and not world.first(name, rank):
            yield need("recv_forward")
        for encoder in world.layout.encoders if name == LANGUAGE else ():
            if world.awaits(encoder, rank, number):
                yield need("recv_soft_tokens", encoder)
    if action.kind == backward and world.works(name, rank, number):
        if not world.last(name, rank):
            yield need("recv_backward")
        elif name != LANGUAGE:
            yield need("recv_soft_token_gradients")
        else:
            giving = (decoder for decoder in world.layout.decoders if world.gives(decoder, rank, number))
            yield from (need("recv_state_gradients", d) for d in giving if d in world.trained_from)
    if action.kind in ("send_forward", "observe", backward):
        yield need(forward)
    if action.kind == "send_soft_tokens" and world.encodes(name, rank, number):
        yield need("encode")
    if action.kind == "send_backward":
        yield need(backward)
    if action.kind == "send_soft_token_gradients":
        yield need("backward", LANGUAGE)
    if action.kind in ("recv_forward", "recv_backward"):
        yield need("post_recv_" + action.kind.removeprefix("recv_"))
    if action.kind == "recv_soft_tokens":
        yield need("send_soft_tokens" if world.ends(name, rank)[0] else "post_recv_soft_tokens")
    if action.kind == "recv_soft_token_gradients":
        yield need("send_soft_token_gradients" if world.ends(name, rank)[1] else "post_recv_soft_token_gradients")


def _decoder_needs(world: World, action: Action, rank: int) -> Iterator[Action]:
    name, number = action.module, action.microbatch
    before = {
        "send_states": ("forward", LANGUAGE),
        "recv_states": ("send_states" if world.at_last_stage(rank) else "post_recv_states", name),
        "decode": ("recv_states", name),
        "recv_state_gradients": (
            "send_state_gradients" if rank in world.layout.grids[name] else "post_recv_state_gradients",
            name,
        ),
    }
    if world.decodes(name, rank, number):
        before["send_state_gradients"] = ("decode", name)
    if action.kind in before:
        kind, module = before[action.kind]
        yield Action(kind, number, module)  # type: ignore[arg-type]


def complete(world: World, rank: int) -> Counter[Action]:
    """Everything that a rank has to do in the step, each action as often as it occurs."""
    expected = Counter[Action]()
    for number, name in product(range(world.manifest.num_microbatches), world.layout.decoders):
        gives, decodes = world.gives(name, rank, number), world.decodes(name, rank, number)
        verbs = [
            "send" if here else "post_recv" for here in (world.at_last_stage(rank), rank in world.layout.grids[name])
        ]
        kinds = [f"{verbs[0]}_states"] * (gives or decodes) + ["recv_states", "decode"] * decodes
        if world.train and name in world.trained_from:
            kinds += [f"{verbs[1]}_state_gradients"] * (gives or decodes) + ["recv_state_gradients"] * gives
        expected.update(Action(kind, number, name) for kind in kinds)  # type: ignore[arg-type]
    for number, name in product(range(world.manifest.num_microbatches), (*world.layout.encoders, LANGUAGE)):
        kinds = []
        if name in world.layout.modules_of(rank):
            works, first, last = world.works(name, rank, number), world.first(name, rank), world.last(name, rank)
            forward, backward = passes_of(name)
            kinds += [forward] * (works or name == LANGUAGE) + ["observe"] * (world.observed and name == LANGUAGE)
            kinds += ["post_recv_forward", "recv_forward"] * (works and not first)
            kinds += ["send_forward"] * (works and not last)
            if world.returns(name, rank):
                kinds += [backward] * (works or name == LANGUAGE)
                kinds += ["post_recv_backward", "recv_backward"] * (works and not last)
                goes_on = not first and world.returns(name, world.neighbour(name, rank, -1))
                kinds += ["send_backward"] * (works and goes_on)
        if name != LANGUAGE:
            encodes, awaits = world.encodes(name, rank, number), world.awaits(name, rank, number)
            sends, receives = world.ends(name, rank)
            kinds += ["send_soft_tokens" if sends else "post_recv_soft_tokens"] * (encodes or awaits) + [
                "recv_soft_tokens"
            ] * awaits
            if world.train and name in world.trained_from:
                kinds += ["send_soft_token_gradients" if receives else "post_recv_soft_token_gradients"] * (
                    encodes or awaits
                )
                kinds += ["recv_soft_token_gradients"] * encodes
        expected.update(Action(kind, number, name) for kind in kinds)  # type: ignore[arg-type]
    return expected


def passes_of(module: str) -> tuple[str, str]:
    """Kinds of a module's two passes."""
    return ("forward", "backward") if module == LANGUAGE else ("encode", "encoder_backward")

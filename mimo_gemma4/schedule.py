"""One global step as a list of actions per rank: pure Python from layout and manifest, so tests can check it alone.

Every list follows one global order, which is why no layout can deadlock. Time is counted in slots: with P language
stages, stage s runs the forward pass of round k in slot 2k + s and its backward pass in slot 2k + 2P - 1 - s. Each pass
comes after those that it needs, and sorting a stage's passes by slot is 1F1B: at most P - s microbatches wait for their
backward pass. Encoders have their turn at the end of a slot, in time for the first stage.

A round is one microbatch of every language lane. A lane that is empty in a round moves nothing between its stages; its
passes stay in the list, because lanes that share experts enter the same exchanges.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from mimo_gemma4.data.manifest import StepManifest
from mimo_gemma4.layout import LANGUAGE, Layout

ActionKind = Literal[
    "receive_hidden",
    "receive_gradient",
    "receive_rows",
    "expect_rows",
    "forward",
    "backward",
    "send_hidden",
    "send_gradient",
    "send_row_gradients",
    "observe",
    "expect_hidden",
    "expect_gradient",
    "receive_row_gradients",
    "expect_row_gradients",
    "encoder_backward",
    "encode",
    "send_rows",
]
"""What a rank does.

- `forward`, `backward`: a language stage's passes. `send_hidden` gives the next stage what it needs, `send_gradient`
  the previous one; `expect_…` makes room for it on the other side and `receive_…` waits for it.
- `encode`, `encoder_backward`: an encoder's passes. `send_rows` gives the first language stage its output,
  `send_row_gradients` gives back what the rows got. A rank that sends and receives in one round of an edge starts both
  with `send_…`, in one batch: on NCCL its peers, which do the same, would otherwise wait for one another.
- `observe`: whoever watches an evaluation looks at the microbatch, on all stages when it has gone through them.
"""

_ORDER: dict[ActionKind, int] = {kind: number for number, kind in enumerate(get_args(ActionKind))}
"""Order of the kinds inside a slot: that in which they are written above."""
_TRANSPORT: dict[str, tuple[ActionKind, ActionKind, ActionKind]] = {
    "hidden": ("expect_hidden", "receive_hidden", "send_hidden"),
    "gradient": ("expect_gradient", "receive_gradient", "send_gradient"),
}


@dataclass(frozen=True)
class Action:
    """One thing that a rank does: `kind`, in `round`, for `module` (the encoder it concerns, or `language`)."""

    kind: ActionKind
    round: int
    module: str


Slotted = Iterator[tuple[int, Action]]


def plan_step(
    layout: Layout,
    manifest: StepManifest,
    rank: int,
    *,
    trainable: frozenset[str],
    run_ahead: Mapping[str, int],
    train: bool = True,
    observed: bool = False,
) -> list[Action]:
    """The actions of one rank in one global step, in execution order.

    Args:
        layout: all grids.
        manifest: the step's plan.
        rank: global rank.
        trainable: encoders whose rows need a gradient; of others nothing comes back.
        run_ahead: per encoder, how many microbatches it may have encoded, beyond one for each further language stage,
            without having their gradients back; at least 1. Without backward pass an encoder on ranks of its own runs
            ahead without bound.
        train: whether there is a backward pass at all.
        observed: whether every microbatch is observed.
    """
    returning = trainable if train else frozenset()
    slotted = [*_edges(layout, manifest, rank, returning, run_ahead)]
    if rank in layout.language:
        slotted += _stage(layout, manifest, rank, train, observed)
    modules = {name: number for number, name in enumerate(layout.encoders)} | {LANGUAGE: len(layout.encoders)}
    slotted.sort(key=lambda entry: (entry[0], _ORDER[entry[1].kind], modules[entry[1].module]))
    return [action for _, action in slotted]


def forward_slot(round_: int, stage: int) -> int:
    """Slot of a stage's forward pass."""
    return 2 * round_ + stage


def backward_slot(round_: int, stage: int, stages: int) -> int:
    """Slot of a stage's backward pass, in a pipeline of `stages`."""
    return 2 * (round_ + stages) - 1 - stage


def _stage(layout: Layout, manifest: StepManifest, rank: int, train: bool, observed: bool) -> Slotted:
    """Slots and actions of a language stage."""
    stages, at = layout.language.pp, layout.language.coordinate(rank)
    filled = [number for number in range(manifest.rounds) if manifest.microbatch(at.dp, number).rows]

    def moves(what: Literal["hidden", "gradient"], slot_of: list[int], receives: bool, sends: bool) -> Slotted:
        """What arrives for and leaves after the passes in `slot_of`; there is room for it one round ahead."""
        expect, receive, send = _TRANSPORT[what]
        for number in filled:
            if receives:
                yield slot_of[number] - 2, Action(expect, number, LANGUAGE)
                yield slot_of[number], Action(receive, number, LANGUAGE)
            if sends:
                yield slot_of[number], Action(send, number, LANGUAGE)

    rounds, first, last = range(manifest.rounds), at.pp == 0, at.pp == stages - 1
    forward = [forward_slot(number, at.pp) for number in rounds]
    yield from ((forward[number], Action("forward", number, LANGUAGE)) for number in rounds)
    yield from moves("hidden", forward, receives=not first, sends=not last)
    if observed:  # by all stages in one slot, for they may wait for one another
        yield from ((forward_slot(number, stages - 1), Action("observe", number, LANGUAGE)) for number in rounds)
    if train:
        backward = [backward_slot(number, at.pp, stages) for number in rounds]
        yield from ((backward[number], Action("backward", number, LANGUAGE)) for number in rounds)
        yield from moves("gradient", backward, receives=not last, sends=not first)


def _edges(
    layout: Layout, manifest: StepManifest, rank: int, returning: frozenset[str], run_ahead: Mapping[str, int]
) -> Slotted:
    """Slots and actions of this rank's encoders, and of the edges that end in its language lane."""
    stages = layout.language.pp
    lane = None
    if rank in layout.language and (at := layout.language.coordinate(rank)).pp == 0:
        lane = at.dp
    for name in layout.encoders:
        grid = layout.grids[name]
        encoder_lane = grid.coordinate(rank).dp if rank in grid else None
        ahead = run_ahead[name]
        if encoder_lane is not None and name not in returning and _alone(layout, name, encoder_lane):
            ahead = max(1, manifest.rounds)
        for number in range(manifest.rounds):
            encodes = encoder_lane is not None and bool(manifest.encoded(name, number, encoder_lane))
            awaits = lane is not None and bool(manifest.awaited(name, number, lane))
            forward, backward = forward_slot(number, 0), backward_slot(number, 0, stages)
            # Ahead by one, an encoder works just in time; by more, what it sends and gets back travels during a pass.
            spare = 1 if ahead > 1 else 0
            encode, encoder_backward = forward - 2 * ahead + 1 + spare, backward + spare
            moves: list[tuple[int, ActionKind]] = []
            if encodes:
                moves += [(encode, "encode"), (encode, "send_rows")]
            elif awaits:
                moves += [(forward - 2 if encoder_lane is None else encode, "expect_rows")]
            if awaits:
                moves += [(forward, "receive_rows")]
            if awaits and name in returning:
                moves += [(backward, "send_row_gradients")]
            elif encodes and name in returning:
                moves += [(encoder_backward - 2, "expect_row_gradients")]
            if encodes and name in returning:
                moves += [(encoder_backward, "receive_row_gradients"), (encoder_backward, "encoder_backward")]
            yield from ((slot, Action(kind, number, name)) for slot, kind in moves)


def _alone(layout: Layout, name: str, lane: int) -> bool:
    """Whether no rank of an encoder's lane holds another module; asked of lanes, whose ranks must do the same."""
    grid = layout.grids[name]
    return all(len(layout.modules_of(grid.rank_at(tp=tp, dp=lane))) == 1 for tp in range(grid.tp))

"""One global step as a list of actions per rank: pure Python from layout and manifest, so tests can check it alone.

Every list follows one global order, in which a pass has one place for all its ranks and a transfer one place for both
its ends, behind the pass that it comes from. That is why no layout can deadlock, not even where a rank's host waits for
its whole device, posted receives included, before it goes on (as CUDA does to load a kernel).

Time is counted in slots: with P language stages, stage s runs the forward pass of round k in slot 2k + s and its
backward pass in slot 2k + 2P - 1 - s. Each pass comes after those that it needs, and sorting a stage's passes by slot
is 1F1B: at most P - s microbatches wait for their backward pass. Encoders have their turn at the end of a slot, in time
for the first stage. An encoder's own stages stand in front of the language's: each has its forward pass a slot before
the next one's, and its backward pass a slot after.

Decoders have their turn behind the last stage's forward pass. One on ranks of its own is one more stage: backward slots
count P + 1 stages, so that the last stage runs its next forward pass while the decoder works, and stages hold P + 1 - s
microbatches. Nothing waits behind a decoder, whose forward and backward pass are therefore one.

A round is one microbatch of every language lane. A lane that is empty in a round moves nothing between its stages; its
passes stay in the list, because lanes that share experts enter the same exchanges.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from mimo_gemma4.data.manifest import StepManifest
from mimo_gemma4.distributed.layout import LANGUAGE, Layout

ActionKind = Literal[
    "expect_hidden",
    "receive_hidden",
    "send_hidden",
    "expect_gradient",
    "receive_gradient",
    "send_gradient",
    "forward",
    "backward",
    "observe",
    "encode",
    "encoder_backward",
    "expect_rows",
    "receive_rows",
    "send_rows",
    "expect_row_gradients",
    "receive_row_gradients",
    "send_row_gradients",
    "decode",
    "expect_states",
    "receive_states",
    "send_states",
    "expect_state_gradients",
    "receive_state_gradients",
    "send_state_gradients",
]
"""What a rank does.

- `forward`, `backward`: a language stage's passes. `send_hidden` gives the next stage what it needs, `send_gradient`
  the previous one; `expect_…` makes room for it on the other side and `receive_…` waits for it.
- `encode`, `encoder_backward`: the passes of an encoder's stage. Between its stages moves what moves between those of
  the language. `send_rows` gives the first language stage the output of the last, `send_row_gradients` gives back what
  the rows got. A rank at both ends of an edge starts sending and receiving in one batch, with `send_…`.
- `decode`: a decoder's forward and backward pass. `send_states` gives it rows of the last language stage's hidden
  states, `send_state_gradients` gives back what they got; both are as for the rows of encoders.
- `observe`: whoever watches an evaluation looks at the microbatch, on all stages when it has gone through them.
"""

_LANGUAGE_TURN: tuple[ActionKind, ...] = (
    "receive_hidden",
    "receive_gradient",
    "receive_rows",
    "receive_state_gradients",
    "forward",
    "backward",
    "send_hidden",
    "send_gradient",
    "send_row_gradients",
    "send_states",
    "receive_states",
    "decode",
    "send_state_gradients",
    "observe",
)
"""Order inside a slot of what a rank does for its language stage and decoders, …"""
_ENCODER_TURN: tuple[ActionKind, ...] = (
    "receive_row_gradients",
    "receive_gradient",
    "encoder_backward",
    "send_gradient",
    "receive_hidden",
    "encode",
    "send_hidden",
    "send_rows",
)
"""… and after that for its encoder stages. `expect_…` has the place of its `send_…`."""
_TRANSPORT: dict[str, tuple[ActionKind, ActionKind, ActionKind]] = {
    "hidden": ("expect_hidden", "receive_hidden", "send_hidden"),
    "gradient": ("expect_gradient", "receive_gradient", "send_gradient"),
}


@dataclass(frozen=True)
class Action:
    """One thing that a rank does: `kind`, in `round`, for `module` (an encoder, a decoder or `language`)."""

    kind: ActionKind
    round: int
    module: str


Slots = Sequence[int]
"""The slot of a pass, by round."""
Slotted = Iterator[tuple[int, Action]]


def plan_step(
    layout: Layout,
    manifest: StepManifest,
    rank: int,
    *,
    trained_from: Mapping[str, int],
    run_ahead: Mapping[str, int],
    train: bool = True,
    observed: bool = False,
) -> list[Action]:
    """The actions of one rank in one global step, in execution order.

    Args:
        layout: all grids.
        manifest: the step's plan.
        rank: global rank.
        trained_from: by encoder whose rows need a gradient, the first of its stages that trains; stages before it, and
            all of other encoders, have no backward pass. A decoder whose states need a gradient is in it, too.
        run_ahead: per encoder, how many microbatches it may have encoded, beyond one for each further stage between it
            and the language model's last, without having their gradients back; at least 1. On ranks of its own an
            encoder without backward pass waits for nothing, so it is not bounded.
        train: whether there is a backward pass at all.
        observed: whether every microbatch is observed.
    """
    slotted: list[tuple[int, Action]] = []
    if rank in layout.language:
        slotted += _stage(layout, manifest, rank, train, observed)
    for name in layout.decoders:
        slotted += _decoder(layout, manifest, rank, name, train and name in trained_from)
    for name in layout.encoders:
        returning = trained_from.get(name) if train else None
        if rank in layout.grids[name]:
            slotted += _encoder_stage(layout, manifest, rank, name, run_ahead[name], returning)
        slotted += _edge(layout, manifest, rank, name, run_ahead[name], returning is not None)
    modules = {name: number for number, name in enumerate((*layout.encoders, *layout.decoders, LANGUAGE))}
    slotted.sort(key=lambda entry: (entry[0], *_turn(entry[1]), modules[entry[1].module]))
    return [action for _, action in slotted]


def _turn(action: Action) -> tuple[bool, int]:
    """Place of an action inside its slot."""
    place = action.kind.replace("expect_", "send_")
    encoders = action.module != LANGUAGE and place in _ENCODER_TURN
    return encoders, (_ENCODER_TURN if encoders else _LANGUAGE_TURN).index(place)


def pipeline_depth(layout: Layout) -> int:
    """Stages behind the encoders: those of the language module, and one for decoders apart from the last of them."""
    last = layout.language.stage_ranks(layout.language.pp - 1)
    return layout.language.pp + any(set(layout.grids[name].ranks).isdisjoint(last) for name in layout.decoders)


def forward_slot(round_: int, stage: int) -> int:
    """Slot of a stage's forward pass."""
    return 2 * round_ + stage


def backward_slot(round_: int, stage: int, depth: int) -> int:
    """Slot of a language stage's backward pass, with `depth` stages."""
    return 2 * (round_ + depth) - 1 - stage


def _stage(layout: Layout, manifest: StepManifest, rank: int, train: bool, observed: bool) -> Slotted:
    """Slots and actions of a language stage."""
    stages, at = layout.language.pp, layout.language.coordinate(rank)
    rounds, first, last = range(manifest.rounds), at.pp == 0, at.pp == stages - 1
    filled = [number for number in rounds if manifest.microbatch(at.dp, number).rows]
    forward = [forward_slot(number, at.pp) for number in rounds]
    yield from _each("forward", LANGUAGE, rounds, forward)
    yield from _moves("hidden", LANGUAGE, filled, forward, receives=not first, sends=not last)
    if observed:  # by all stages in one slot, for they may wait for one another
        yield from _each("observe", LANGUAGE, rounds, [forward_slot(number, stages - 1) for number in rounds])
    if train:
        depth = pipeline_depth(layout)
        backward = [backward_slot(number, at.pp, depth) for number in rounds]
        yield from _each("backward", LANGUAGE, rounds, backward)
        yield from _moves("gradient", LANGUAGE, filled, backward, receives=not last, sends=not first)


def _each(kind: ActionKind, module: str, rounds: Iterable[int], slots: Slots) -> Slotted:
    """One action in each of the rounds."""
    return ((slots[number], Action(kind, number, module)) for number in rounds)


def _moves(
    what: Literal["hidden", "gradient"], module: str, rounds: Sequence[int], slots: Slots, receives: bool, sends: bool
) -> Slotted:
    """What arrives for the passes in `slots`, from passes a slot before, and what leaves behind them."""
    expect, receive, send = _TRANSPORT[what]
    if receives:
        yield from _each(expect, module, rounds, [slot - 1 for slot in slots])
        yield from _each(receive, module, rounds, slots)
    if sends:
        yield from _each(send, module, rounds, slots)


def _encoder_slots(layout: Layout, name: str, stage: int, rounds: int, run_ahead: int) -> tuple[Slots, Slots]:
    """Slots of the two passes of a stage of an encoder."""
    depth = pipeline_depth(layout)
    # Just in time if 1; every further microbatch leaves a pass for rows to travel, and one for gradients.
    early = run_ahead + layout.grids[name].pp - 1 - stage
    encode = [forward_slot(number, 0) - early for number in range(rounds)]
    backward = [backward_slot(number, 0, depth) + early - 1 for number in range(rounds)]
    return encode, backward


def _encoder_stage(
    layout: Layout, manifest: StepManifest, rank: int, name: str, run_ahead: int, returning: int | None
) -> Slotted:
    """Slots and actions of this rank's stage of an encoder; `returning` is the first stage with a backward pass."""
    grid = layout.grids[name]
    at = grid.coordinate(rank)
    first, last = at.pp == 0, at.pp == grid.pp - 1
    encode, backward = _encoder_slots(layout, name, at.pp, manifest.rounds, run_ahead)
    rounds = [number for number in range(manifest.rounds) if manifest.encoded(name, number, at.dp)]
    yield from _each("encode", name, rounds, encode)
    yield from _moves("hidden", name, rounds, encode, receives=not first, sends=not last)
    if returning is None or at.pp < returning:
        return
    yield from _each("encoder_backward", name, rounds, backward)
    yield from _moves("gradient", name, rounds, backward, receives=not last, sends=at.pp > returning)


def _edge(layout: Layout, manifest: StepManifest, rank: int, name: str, run_ahead: int, returns: bool) -> Slotted:
    """Slots and actions of what a rank sends and receives between an encoder and the first language stage."""
    grid, language, rounds = layout.grids[name], layout.language, range(manifest.rounds)
    encode, encoder_backward = _encoder_slots(layout, name, grid.pp - 1, manifest.rounds, run_ahead)
    forward = [forward_slot(number, 0) for number in rounds]
    depth = pipeline_depth(layout)
    backward = [backward_slot(number, 0, depth) for number in rounds]
    sends, receives = (rank in ranks for ranks in layout.edge(name))
    encoded, awaited = set[int](), set[int]()
    if sends:
        encoded = {number for number in rounds if manifest.encoded(name, number, grid.coordinate(rank).dp)}
    if receives:
        awaited = {number for number in rounds if manifest.awaited(name, number, language.coordinate(rank).dp)}
    moved = sorted(encoded | awaited)
    yield from _each("send_rows" if sends else "expect_rows", name, moved, encode)
    yield from _each("receive_rows", name, sorted(awaited), forward)
    if returns:
        yield from _each("send_row_gradients" if receives else "expect_row_gradients", name, moved, backward)
        yield from _each("receive_row_gradients", name, sorted(encoded), encoder_backward)


def _decoder(layout: Layout, manifest: StepManifest, rank: int, name: str, returns: bool) -> Slotted:
    """Slots and actions of a decoder, on its ranks and on those of the last language stage."""
    stage, rounds = layout.language_stage(name), range(manifest.rounds)
    at_decoder, at_stage = (rank in ranks for ranks in layout.edge(name))
    gives: list[int] = []
    decodes: list[int] = []
    if at_stage:
        lane = layout.language.coordinate(rank).dp
        gives = [number for number in rounds if manifest.awaited(name, number, lane)]
    if at_decoder:
        lane = layout.grids[name].coordinate(rank).dp
        decodes = [number for number in rounds if manifest.encoded(name, number, lane)]
    either = sorted({*gives, *decodes})
    forward = [forward_slot(number, stage) for number in rounds]
    yield from _each("send_states" if at_stage else "expect_states", name, either, forward)
    yield from _each("receive_states", name, decodes, forward)
    yield from _each("decode", name, decodes, forward)
    if returns:
        depth = pipeline_depth(layout)
        backward = [backward_slot(number, stage, depth) for number in rounds]
        yield from _each("send_state_gradients" if at_decoder else "expect_state_gradients", name, either, forward)
        yield from _each("receive_state_gradients", name, gives, backward)

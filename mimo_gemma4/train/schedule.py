"""One global step as a list of actions per rank: pure Python from layout and manifest, so tests can check it alone.

Every list follows one global order, in which a pass has one place for all its ranks and a transfer one place for both
its ends, behind the pass that it comes from. That is why no layout can deadlock, not even where a rank's host waits for
its whole device, posted receives included, before it goes on (as CUDA does to load a kernel).

Encoders run ahead: `run_ahead` bounds how many microbatches an encoder holds without having their gradients back, and
so in which slot it encodes each (`_encoder_slots`).

Time is counted in slots: with P language stages, stage s runs the forward pass of microbatch k in slot 2k + s and its
backward pass in slot 2k + 2P - 1 - s. Each pass comes after those that it needs, and sorting a stage's passes by slot
is 1F1B: at most P - s microbatches wait for their backward pass. With P = 2:

    slot      0   1   2   3   4   5
    stage 0  F0      F1  B0      B1
    stage 1      F0  B0  F1  B1

Encoders have their turn at the end of a slot, in time for the first stage. An encoder's own stages stand in front of
the language's: each has its forward pass a slot before the next one's, and its backward pass a slot after.

Decoders have their turn behind the last stage's forward pass. One on ranks of its own is one more stage: backward slots
count P + 1 stages, so that the last stage runs its next forward pass while the decoder works, and stages hold P + 1 - s
microbatches. Nothing waits behind a decoder, whose forward and backward pass are therefore one.

Microbatches are counted alike by all lanes and modules. A lane whose microbatch is empty moves nothing between its
stages; its passes stay in the list, because lanes that share experts enter the same exchanges.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from mimo_gemma4.data.manifest import StepManifest
from mimo_gemma4.distributed.layout import LANGUAGE, Layout

ActionKind = Literal[
    "post_recv_forward",
    "recv_forward",
    "send_forward",
    "post_recv_backward",
    "recv_backward",
    "send_backward",
    "forward",
    "backward",
    "observe",
    "encode",
    "encoder_backward",
    "post_recv_soft_tokens",
    "recv_soft_tokens",
    "send_soft_tokens",
    "post_recv_soft_token_gradients",
    "recv_soft_token_gradients",
    "send_soft_token_gradients",
    "decode",
    "post_recv_states",
    "recv_states",
    "send_states",
    "post_recv_state_gradients",
    "recv_state_gradients",
    "send_state_gradients",
]
"""What a rank does.

`send_…` starts sending, `post_recv_…` makes room and starts receiving, `recv_…` waits for what was posted.

- `forward`, `backward`: the passes of a language stage; `encode`, `encoder_backward`: those of an encoder's stage.
  `send_forward` gives the next stage of the module what it needs, `send_backward` gives the previous one its gradients.
- `send_soft_tokens` gives the first language stage the output of an encoder's last stage, `send_soft_token_gradients`
  gives back their gradients. A rank at both ends of an edge sends and receives in one batch, with `send_…`.
- `decode`: a decoder's forward and backward pass. `send_states` gives it the last language stage's hidden states at its
  soft tokens, `send_state_gradients` gives back their gradients; both are as for soft tokens of encoders.
- `observe`: whoever watches an evaluation looks at the microbatch, on all stages when it has gone through them.
"""

_LANGUAGE_TURN: tuple[ActionKind, ...] = (
    "recv_forward",
    "recv_backward",
    "recv_soft_tokens",
    "recv_state_gradients",
    "forward",
    "backward",
    "send_forward",
    "send_backward",
    "send_soft_token_gradients",
    "send_states",
    "recv_states",
    "decode",
    "send_state_gradients",
    "observe",
)
"""Order inside a slot of what a rank does for its language stage and decoders, …"""
_ENCODER_TURN: tuple[ActionKind, ...] = (
    "recv_soft_token_gradients",
    "recv_backward",
    "encoder_backward",
    "send_backward",
    "recv_forward",
    "encode",
    "send_forward",
    "send_soft_tokens",
)
"""… and after that for its encoder stages. `post_recv_…` has the place of its `send_…`."""
_TRANSPORT: dict[str, tuple[ActionKind, ActionKind, ActionKind]] = {
    "forward": ("post_recv_forward", "recv_forward", "send_forward"),
    "backward": ("post_recv_backward", "recv_backward", "send_backward"),
}


@dataclass(frozen=True)
class Action:
    """One thing that a rank does, for one microbatch of one module: an encoder, a decoder or `language`."""

    kind: ActionKind
    microbatch: int
    module: str

    @property
    def waits(self) -> bool:
        """Whether the rank waits for others."""
        return self.kind.startswith("recv_")


Slots = Sequence[int]
"""The slot of a pass, by microbatch."""
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
        trained_from: by encoder whose soft tokens need a gradient, the first of its stages that trains; stages before
            it, and all of other encoders, have no backward pass. A decoder whose states need a gradient is in it, too.
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
    place = action.kind.replace("post_recv_", "send_")
    encoders = action.module != LANGUAGE and place in _ENCODER_TURN
    return encoders, (_ENCODER_TURN if encoders else _LANGUAGE_TURN).index(place)


def pipeline_depth(layout: Layout) -> int:
    """Stages behind the encoders: those of the language module, and one for decoders apart from the last of them."""
    last = layout.language.stage_ranks(layout.language.pp - 1)
    return layout.language.pp + any(set(layout.grids[name].ranks).isdisjoint(last) for name in layout.decoders)


def forward_slot(microbatch: int, stage: int) -> int:
    """Slot of a stage's forward pass."""
    return 2 * microbatch + stage


def backward_slot(microbatch: int, stage: int, depth: int) -> int:
    """Slot of a language stage's backward pass, with `depth` stages."""
    return 2 * (microbatch + depth) - 1 - stage


def _stage(layout: Layout, manifest: StepManifest, rank: int, train: bool, observed: bool) -> Slotted:
    """Slots and actions of a language stage."""
    stages, at = layout.language.pp, layout.language.coordinate(rank)
    microbatches, first, last = range(manifest.num_microbatches), at.pp == 0, at.pp == stages - 1
    filled = [number for number in microbatches if manifest.microbatch(at.dp, number).sequences]
    forward = [forward_slot(number, at.pp) for number in microbatches]
    yield from _each("forward", LANGUAGE, microbatches, forward)
    yield from _moves("forward", LANGUAGE, filled, forward, receives=not first, sends=not last)
    if observed:  # by all stages in one slot, for they may wait for one another
        yield from _each(
            "observe", LANGUAGE, microbatches, [forward_slot(number, stages - 1) for number in microbatches]
        )
    if train:
        depth = pipeline_depth(layout)
        backward = [backward_slot(number, at.pp, depth) for number in microbatches]
        yield from _each("backward", LANGUAGE, microbatches, backward)
        yield from _moves("backward", LANGUAGE, filled, backward, receives=not last, sends=not first)


def _each(kind: ActionKind, module: str, microbatches: Iterable[int], slots: Slots) -> Slotted:
    """One action for each of the microbatches."""
    return ((slots[number], Action(kind, number, module)) for number in microbatches)


def _moves(
    what: Literal["forward", "backward"],
    module: str,
    microbatches: Sequence[int],
    slots: Slots,
    receives: bool,
    sends: bool,
) -> Slotted:
    """What arrives for the passes in `slots`, from passes a slot before, and what leaves behind them."""
    post_recv, recv, send = _TRANSPORT[what]
    if receives:
        yield from _each(post_recv, module, microbatches, [slot - 1 for slot in slots])
        yield from _each(recv, module, microbatches, slots)
    if sends:
        yield from _each(send, module, microbatches, slots)


def _encoder_slots(layout: Layout, name: str, stage: int, microbatches: int, run_ahead: int) -> tuple[Slots, Slots]:
    """Slots of the two passes of a stage of an encoder."""
    depth = pipeline_depth(layout)
    # Just in time if 1; every further microbatch leaves a pass for soft tokens to travel, and one for gradients.
    early = run_ahead + layout.grids[name].pp - 1 - stage
    encode = [forward_slot(number, 0) - early for number in range(microbatches)]
    backward = [backward_slot(number, 0, depth) + early - 1 for number in range(microbatches)]
    return encode, backward


def _encoder_stage(
    layout: Layout, manifest: StepManifest, rank: int, name: str, run_ahead: int, returning: int | None
) -> Slotted:
    """Slots and actions of this rank's stage of an encoder; `returning` is the first stage with a backward pass."""
    grid = layout.grids[name]
    at = grid.coordinate(rank)
    first, last = at.pp == 0, at.pp == grid.pp - 1
    encode, backward = _encoder_slots(layout, name, at.pp, manifest.num_microbatches, run_ahead)
    microbatches = [
        number for number in range(manifest.num_microbatches) if manifest.items_of_module(name, number, at.dp)
    ]
    yield from _each("encode", name, microbatches, encode)
    yield from _moves("forward", name, microbatches, encode, receives=not first, sends=not last)
    if returning is None or at.pp < returning:
        return
    yield from _each("encoder_backward", name, microbatches, backward)
    yield from _moves("backward", name, microbatches, backward, receives=not last, sends=at.pp > returning)


def _edge(layout: Layout, manifest: StepManifest, rank: int, name: str, run_ahead: int, returns: bool) -> Slotted:
    """Slots and actions of what a rank sends and receives between an encoder and the first language stage."""
    grid, language, microbatches = layout.grids[name], layout.language, range(manifest.num_microbatches)
    encode, encoder_backward = _encoder_slots(layout, name, grid.pp - 1, manifest.num_microbatches, run_ahead)
    forward = [forward_slot(number, 0) for number in microbatches]
    depth = pipeline_depth(layout)
    backward = [backward_slot(number, 0, depth) for number in microbatches]
    sends, receives = (rank in ranks for ranks in layout.edge(name))
    encoded, awaited = set[int](), set[int]()
    if sends:
        encoded = {
            number for number in microbatches if manifest.items_of_module(name, number, grid.coordinate(rank).dp)
        }
    if receives:
        awaited = {
            number for number in microbatches if manifest.items_of_lane(name, number, language.coordinate(rank).dp)
        }
    moved = sorted(encoded | awaited)
    yield from _each("send_soft_tokens" if sends else "post_recv_soft_tokens", name, moved, encode)
    yield from _each("recv_soft_tokens", name, sorted(awaited), forward)
    if returns:
        yield from _each(
            "send_soft_token_gradients" if receives else "post_recv_soft_token_gradients", name, moved, backward
        )
        yield from _each("recv_soft_token_gradients", name, sorted(encoded), encoder_backward)


def _decoder(layout: Layout, manifest: StepManifest, rank: int, name: str, returns: bool) -> Slotted:
    """Slots and actions of a decoder, on its ranks and on those of the last language stage."""
    stage, microbatches = layout.language_stage(name), range(manifest.num_microbatches)
    at_decoder, at_stage = (rank in ranks for ranks in layout.edge(name))
    gives: list[int] = []
    decodes: list[int] = []
    if at_stage:
        lane = layout.language.coordinate(rank).dp
        gives = [number for number in microbatches if manifest.items_of_lane(name, number, lane)]
    if at_decoder:
        lane = layout.grids[name].coordinate(rank).dp
        decodes = [number for number in microbatches if manifest.items_of_module(name, number, lane)]
    either = sorted({*gives, *decodes})
    forward = [forward_slot(number, stage) for number in microbatches]
    yield from _each("send_states" if at_stage else "post_recv_states", name, either, forward)
    yield from _each("recv_states", name, decodes, forward)
    yield from _each("decode", name, decodes, forward)
    if returns:
        depth = pipeline_depth(layout)
        backward = [backward_slot(number, stage, depth) for number in microbatches]
        yield from _each("send_state_gradients" if at_decoder else "post_recv_state_gradients", name, either, forward)
        yield from _each("recv_state_gradients", name, gives, backward)

"""The plan of one global step: who reads, encodes and trains on what. Numbers only, equal on every rank."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

_Key = tuple[str, int, int]


@dataclass(frozen=True)
class SampleSlot:
    """Where one sample of the global batch is trained on."""

    sample: int
    """Position in the global batch, 0 … global_batch_size - 1."""
    index: int
    """Number of the sample in the dataset index."""
    lane: int
    """Language data-parallel lane."""
    microbatch: int
    """Microbatch of that lane; all lanes and encoders count them alike ("round")."""
    row: int
    """Row of the microbatch, 0 … rows - 1 (always 0 when packed)."""
    start: int
    """First position of the sample in its row."""
    length: int
    """Tokens of the sample, media rows included, padding excluded."""
    padded_length: int
    """Positions the sample occupies in its row: `length`, plus the padding that the layout needs when packed."""


@dataclass(frozen=True)
class MediaSlot:
    """Where one media item is encoded and where its rows go, or where it is decoded and where its rows come from."""

    modality: str
    """Module of the layout that encodes or decodes it."""
    sample: int
    """Position of its sample in the global batch."""
    index: int
    """Number of its sample in the dataset index."""
    ordinal: int
    """Which media item of the sample it is, counted over all modalities in message order."""
    rows: int
    """Soft tokens, which are an encoder's output rows and a decoder's input rows."""
    lane: int
    """Language lane of its sample."""
    microbatch: int
    """Microbatch of that lane, and the round of the module."""
    row: int
    """Row of the microbatch."""
    start: int
    """Position in that row of its first soft token."""
    encoder_lane: int
    """Data-parallel lane of the module."""
    encoder_offset: int
    """First of its rows among those of that lane in the round."""


@dataclass(frozen=True)
class Microbatch:
    """One language microbatch: `rows` sequences of `seq_length` positions; zero of both when a lane idles."""

    lane: int
    number: int
    rows: int
    seq_length: int
    samples: tuple[SampleSlot, ...]
    """In order of (row, start)."""
    packed: bool = False
    """Whether its one row is a THD pack, in which samples follow one another and never attend to each other."""
    cp_layout: Literal["zigzag", "contiguous"] = "zigzag"
    """How context parallel ranks share the sequence."""

    @property
    def segment_starts(self) -> tuple[int, ...] | None:
        """Cumulative padded lengths of a pack's segments, from 0 to its length; None for padded rows.

        Positions beyond the last sample are a segment of their own, which nothing attends to.
        """
        if not self.packed:
            return None
        starts = (0, *(slot.start + slot.padded_length for slot in self.samples))
        return starts if starts[-1] == self.seq_length else (*starts, self.seq_length)


@dataclass(frozen=True)
class Imbalance:
    """Cost of a module's costliest data-parallel lane in a step, over the mean of its lanes; 1 is even."""

    before: float
    """If every sample went to the lane of its position in the global batch, in turn."""
    after: float
    """As planned."""


@dataclass(frozen=True)
class StepManifest:
    """The whole plan of one global step."""

    step: int
    rounds: int
    """Microbatches of every language lane; short lanes have empty ones."""
    microbatches: tuple[Microbatch, ...]
    """All lanes' microbatches, ordered by (lane, number)."""
    media: tuple[MediaSlot, ...]
    """All media items, once for each module that works on them, ordered by (modality, microbatch, encoder_lane,
    encoder_offset)."""
    passed_over: tuple[int, ...] = ()
    """Numbers in the dataset index of the bad samples whose places others took (in one pass over the data: nobody)."""
    imbalance: Mapping[str, Imbalance] = field(default_factory=dict)
    """Of the language model and of every encoder and decoder."""

    @cached_property
    def samples(self) -> tuple[SampleSlot, ...]:
        """Every sample of the global batch, in global batch order."""
        return tuple(sorted((s for m in self.microbatches for s in m.samples), key=lambda s: s.sample))

    @cached_property
    def _encoded(self) -> dict[tuple[str, int, int], tuple[MediaSlot, ...]]:
        return _grouped(self.media, lambda slot: (slot.modality, slot.microbatch, slot.encoder_lane))

    @cached_property
    def _awaited(self) -> dict[tuple[str, int, int], tuple[MediaSlot, ...]]:
        return _grouped(self.media, lambda slot: (slot.modality, slot.microbatch, slot.lane))

    def microbatch(self, lane: int, number: int) -> Microbatch:
        """Microbatch `number` of language lane `lane`."""
        return self.microbatches[lane * self.rounds + number]

    def encoded(self, modality: str, round_: int, encoder_lane: int) -> tuple[MediaSlot, ...]:
        """The items that a lane of an encoder or decoder works on in a round, in the order of their rows."""
        return self._encoded.get((modality, round_, encoder_lane), ())

    def awaited(self, modality: str, round_: int, lane: int) -> tuple[MediaSlot, ...]:
        """The items of `modality` whose rows a language lane's microbatch of a round holds, by encoder lane."""
        return self._awaited.get((modality, round_, lane), ())

    def rows_of(self, module: str) -> int:
        """Rows of all media that an encoder or decoder works on in the step."""
        return sum(slot.rows for slot in self.media if slot.modality == module)


def _grouped(slots: Iterable[MediaSlot], key: Callable[[MediaSlot], _Key]) -> dict[_Key, tuple[MediaSlot, ...]]:
    """The slots of each key, in their order."""
    groups: dict[_Key, list[MediaSlot]] = {}
    for slot in slots:
        groups.setdefault(key(slot), []).append(slot)
    return {value: tuple(group) for value, group in groups.items()}

"""The plan of one global step: who reads, encodes and trains on what. Numbers only, equal on every rank."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

_Key = tuple[str, int, int]


@dataclass(frozen=True)
class PlannedSample:
    """Where one sample of the global batch is trained on."""

    batch_index: int
    """Position in the global batch, 0 … global_batch_size - 1."""
    index: int
    """Number of the sample in the dataset index."""
    lane: int
    """Language data-parallel lane."""
    microbatch: int
    """Number of its microbatch; all lanes and modules count them alike."""
    sequence: int
    """Sequence of the microbatch, 0 … sequences - 1 (always 0 when packed)."""
    start: int
    """First position of the sample in its sequence."""
    length: int
    """Tokens of the sample, soft tokens included, padding excluded."""
    padded_length: int
    """Positions the sample occupies in its sequence: `length`, plus the padding that the layout needs when packed."""


@dataclass(frozen=True)
class PlannedMedia:
    """Where one media item is encoded and where its soft tokens go, or where it is decoded and where they come from."""

    module: str
    """Module of the layout that works on it: an encoder or a decoder."""
    batch_index: int
    """Position of its sample in the global batch."""
    index: int
    """Number of its sample in the dataset index."""
    ordinal: int
    """Which media item of the sample it is, counted over all modalities in message order."""
    soft_tokens: int
    """Tokens that it takes in the sequence: vectors that an encoder returns or a decoder is given."""
    lane: int
    """Language lane of its sample."""
    microbatch: int
    """Number of the microbatch, of that lane and of the module."""
    sequence: int
    """Sequence of the microbatch."""
    start: int
    """Position in that sequence of its first soft token."""
    module_lane: int
    """Data-parallel lane of the module."""
    module_offset: int
    """Its first soft token among those of that lane and microbatch."""


@dataclass(frozen=True)
class Microbatch:
    """One language microbatch: `sequences` of `seq_length` positions each; zero of both when a lane idles."""

    lane: int
    number: int
    sequences: int
    seq_length: int
    samples: tuple[PlannedSample, ...]
    """In order of (sequence, start)."""
    packed: bool = False
    """Whether its one sequence is a THD pack, in which samples follow one another and never attend to each other."""
    cp_layout: Literal["zigzag", "contiguous"] = "zigzag"
    """How context parallel ranks share the sequence."""

    @property
    def segment_starts(self) -> tuple[int, ...] | None:
        """Cumulative padded lengths of a pack's segments, from 0 to its length; None for padded sequences.

        Positions beyond the last sample are a segment of their own, which nothing attends to.
        """
        if not self.packed:
            return None
        starts = (0, *(planned.start + planned.padded_length for planned in self.samples))
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
    num_microbatches: int
    """Microbatches of every language lane; short lanes have empty ones."""
    microbatches: tuple[Microbatch, ...]
    """All lanes' microbatches, ordered by (lane, number)."""
    media: tuple[PlannedMedia, ...]
    """All media items, once for each module that works on them, ordered by (module, microbatch, module_lane,
    module_offset)."""
    skipped_samples: tuple[int, ...] = ()
    """Numbers in the dataset index of the bad samples whose places others took (in one pass over the data: nobody)."""
    imbalance: Mapping[str, Imbalance] = field(default_factory=dict)
    """Of the language model and of every encoder and decoder."""

    @cached_property
    def samples(self) -> tuple[PlannedSample, ...]:
        """Every sample of the global batch, in global batch order."""
        everywhere = (sample for microbatch in self.microbatches for sample in microbatch.samples)
        return tuple(sorted(everywhere, key=lambda sample: sample.batch_index))

    @cached_property
    def _by_module_lane(self) -> dict[_Key, tuple[PlannedMedia, ...]]:
        return _grouped(self.media, lambda item: (item.module, item.microbatch, item.module_lane))

    @cached_property
    def _by_language_lane(self) -> dict[_Key, tuple[PlannedMedia, ...]]:
        return _grouped(self.media, lambda item: (item.module, item.microbatch, item.lane))

    def microbatch(self, lane: int, number: int) -> Microbatch:
        """Microbatch `number` of language lane `lane`."""
        return self.microbatches[lane * self.num_microbatches + number]

    def items_of_module(self, module: str, microbatch: int, module_lane: int) -> tuple[PlannedMedia, ...]:
        """The items of a microbatch that a lane of an encoder or decoder works on, in the order of their outputs."""
        return self._by_module_lane.get((module, microbatch, module_lane), ())

    def items_of_lane(self, module: str, microbatch: int, lane: int) -> tuple[PlannedMedia, ...]:
        """The items of `module` whose soft tokens a language lane's microbatch holds, by the module's lane."""
        return self._by_language_lane.get((module, microbatch, lane), ())

    def soft_tokens_of(self, module: str) -> int:
        """Soft tokens of all media that an encoder or decoder works on in the step."""
        return sum(item.soft_tokens for item in self.media if item.module == module)


def _grouped(
    items: Iterable[PlannedMedia], key: Callable[[PlannedMedia], _Key]
) -> dict[_Key, tuple[PlannedMedia, ...]]:
    """The items of each key, in their order."""
    groups: dict[_Key, list[PlannedMedia]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return {value: tuple(group) for value, group in groups.items()}

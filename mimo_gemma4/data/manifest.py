"""The plan of one global step: which lane reads, encodes and trains on what. Numbers only, equal on every rank."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

_Key = tuple[str, int, int]


@dataclass(frozen=True)
class PlannedSample:
    """Place of one sample of the global batch in the step."""

    batch_index: int
    """Position in the global batch, 0 … global_batch_size - 1."""
    index: int
    """Number of the sample in the dataset index."""
    lane: int
    """Language data-parallel lane."""
    microbatch: int
    """Number of its microbatch, the same for all lanes and modules."""
    sequence: int
    """Sequence of the microbatch, 0 … sequences - 1 (always 0 when packed)."""
    start: int
    """First position of the sample in its sequence."""
    length: int
    """Tokens of the sample, with soft tokens, without padding."""
    padded_length: int
    """Positions of the sample in its sequence: `length`, when packed plus the padding that the layout needs."""


@dataclass(frozen=True)
class PlannedMedia:
    """Place of one media item: where it is encoded or decoded, and where its soft tokens lie in the sequence."""

    module: str
    """Encoder or decoder that works on it."""
    batch_index: int
    """Position of its sample in the global batch."""
    index: int
    """Number of its sample in the dataset index."""
    ordinal: int
    """Its number among all media items of the sample, in message order."""
    soft_tokens: int
    """Its soft tokens: vectors that the encoder returns or the decoder receives."""
    lane: int
    """Language lane of its sample."""
    microbatch: int
    """Number of the microbatch, the same for that lane and the module."""
    sequence: int
    """Sequence of the microbatch."""
    start: int
    """Position of its first soft token in that sequence."""
    module_lane: int
    """Data-parallel lane of the module."""
    module_offset: int
    """Number of its first soft token among those of that module lane and microbatch."""


@dataclass(frozen=True)
class Microbatch:
    """One language microbatch: `sequences` of `seq_length` positions each; both are zero when a lane idles."""

    lane: int
    number: int
    sequences: int
    seq_length: int
    samples: tuple[PlannedSample, ...]
    """In order of (sequence, start)."""
    packed: bool = False
    """Whether its only sequence is a THD pack: samples follow one another and do not attend to each other."""
    cp_layout: Literal["zigzag", "contiguous"] = "zigzag"
    """How context-parallel ranks share the sequence."""

    @property
    def segment_starts(self) -> tuple[int, ...] | None:
        """Cumulative padded lengths of a pack's segments, from 0 to its length; None for padded sequences.

        Padding behind the last sample is a segment of its own.
        """
        if not self.packed:
            return None
        starts = (0, *(sample.start + sample.padded_length for sample in self.samples))
        return starts if starts[-1] == self.seq_length else (*starts, self.seq_length)


@dataclass(frozen=True)
class Imbalance:
    """Cost of a module's costliest lane in a step, divided by the mean of its lanes; 1 is even."""

    before: float
    """Without balancing: samples dealt to the lanes in turn, in global batch order."""
    after: float
    """In the plan."""


@dataclass(frozen=True)
class StepManifest:
    """The whole plan of one global step."""

    step: int
    num_microbatches: int
    """Microbatches of every language lane; a lane with fewer samples has empty ones."""
    microbatches: tuple[Microbatch, ...]
    """All lanes' microbatches, ordered by (lane, number)."""
    media: tuple[PlannedMedia, ...]
    """All media items, once per module that works on them, by (module, microbatch, module_lane, module_offset)."""
    skipped_samples: tuple[int, ...] = ()
    """Dataset numbers of the bad samples that were replaced by others, or left out in a single pass over the data."""
    imbalance: Mapping[str, Imbalance] = field(default_factory=dict)
    """By module: `language`, every encoder and every decoder."""

    @cached_property
    def samples(self) -> tuple[PlannedSample, ...]:
        """Every sample of the global batch, in global batch order."""
        samples = (sample for microbatch in self.microbatches for sample in microbatch.samples)
        return tuple(sorted(samples, key=lambda sample: sample.batch_index))

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
        """The items of a microbatch for one lane of an encoder or decoder, ordered by `module_offset`."""
        return self._by_module_lane.get((module, microbatch, module_lane), ())

    def items_of_lane(self, module: str, microbatch: int, lane: int) -> tuple[PlannedMedia, ...]:
        """The items of `module` whose soft tokens are in a language lane's microbatch, ordered by the module's lane."""
        return self._by_language_lane.get((module, microbatch, lane), ())

    def soft_tokens_of(self, module: str) -> int:
        """Number of soft tokens that an encoder or decoder works on in the step."""
        return sum(item.soft_tokens for item in self.media if item.module == module)


def _grouped(
    items: Iterable[PlannedMedia], key: Callable[[PlannedMedia], _Key]
) -> dict[_Key, tuple[PlannedMedia, ...]]:
    """The items of each key, in the given order."""
    groups: dict[_Key, list[PlannedMedia]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return {value: tuple(group) for value, group in groups.items()}

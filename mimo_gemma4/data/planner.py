"""Plans global steps: where every sample is trained on, and where every media item is encoded or decoded.

A plan is a pure function of (dataset, seed, step, lanes, bad samples), so it is the same on every rank. The samples of
a step depend only on (seed, global index) and on which samples are bad; their places depend on the layout.
"""

import gc
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from heapq import heappop, heapreplace
from typing import Literal

from mimo_gemma4.data.dataset import ShardDataset
from mimo_gemma4.data.manifest import Imbalance, Microbatch, PlannedMedia, PlannedSample, StepManifest
from mimo_gemma4.data.order import Mixture, OrderStart, take_of_each
from mimo_gemma4.data.packing import balance, even_fit, first_fit
from mimo_gemma4.errors import ConfigError, DataError
from mimo_gemma4.media import ItemProcessor


@dataclass(frozen=True)
class DecoderTargets:
    """The media that a decoder works on, and the processors that make its targets."""

    reads: str
    """Modality of the media."""
    lanes: int
    """Data-parallel lanes of the decoder."""
    processors: Mapping[str, ItemProcessor]
    """By media type of that modality."""


@dataclass(frozen=True)
class _Sequence:
    """One sequence of a microbatch: a single sample when padded, a pack of samples when packed."""

    samples: tuple[int, ...]
    """Positions in the global batch."""
    size: int
    """Positions of the sequence."""
    cost: float
    """Cost of training the language model on it."""


class StepPlanner:
    """Plans any global step, in any order; the time for it does not grow with the step number."""

    def __init__(
        self,
        dataset: ShardDataset,
        *,
        global_batch_size: int,
        microbatch_size: int,
        seed: int,
        language_lanes: int,
        encoder_lanes: Mapping[str, int],
        decoders: Mapping[str, DecoderTargets] | None = None,
        packing: bool,
        row_multiple: int = 1,
        total_multiple: int = 1,
        sample_cost: Callable[[int], float] = float,
        shuffle: bool = True,
        repeat: bool = True,
        limit: int | None = None,
        start: OrderStart | None = None,
        choose_cp_layout: Callable[[Sequence[int]], Literal["zigzag", "contiguous"]] | None = None,
    ) -> None:
        """Plan for `language_lanes` data-parallel lanes of the language model and `encoder_lanes` by modality.

        Args:
            decoders: targets of the decoders, by name.
            row_multiple: multiple to which lengths are rounded up: padded, of microbatches; packed, of every sample.
            total_multiple: multiple to which the length of a packed microbatch is rounded up, by padding at its end.
            sample_cost: cost of a sample of that many tokens for the language model, in any unit; the planner balances
                the lanes by it.
            shuffle: a new order in every pass over a source, instead of shard order.
            repeat: mix the sources by weight without end. Otherwise make one pass over all sources in shard order,
                without bad samples; the last batch may be shorter.
            limit: length of that pass: the first samples of every source, by the sources' sizes; it is at least the
                number of sources.
            start: where a resumed run goes on in the order, whose earlier steps cannot be planned; None: the beginning.
            choose_cp_layout: how context-parallel ranks share a pack with these segment starts; None: zigzag.

        Raises `ConfigError` for sizes below 1, `DataError` for media that no module of the layout encodes.
        """
        self.decoders = dict(decoders or {})
        self._media_lanes = {**encoder_lanes, **{name: decoder.lanes for name, decoder in self.decoders.items()}}
        for key, value in (
            ("train.global_batch_size", global_batch_size),
            ("train.microbatch_size", microbatch_size),
            ("language data-parallel size", language_lanes),
            *((f"{name} data-parallel size", lanes) for name, lanes in self._media_lanes.items()),
        ):
            if value < 1:
                raise ConfigError(f"{key} is {value}; it must be at least 1")
        absent = sorted({p.modality for p in dataset.encoder.processors.values()} - set(encoder_lanes))
        if absent:
            raise DataError(f"the data may hold media for the module {absent[0]!r}; add it to layout")
        self.dataset = dataset
        self._pass = take_of_each(dataset.sizes, limit) if not repeat else []
        self.start = start or OrderStart()
        """Where the run entered the order."""
        self.global_batch_size = global_batch_size
        self._microbatch_size, self._repeat, self._sample_cost = microbatch_size, repeat, sample_cost
        self._mixture = Mixture(
            dataset.sizes, dataset.weights, seed=seed, shuffle=shuffle, first_turns=self.start.turns
        )
        self._lanes = language_lanes
        self._packing, self._row_multiple, self._total_multiple = packing, row_multiple, total_multiple
        self._choose_cp_layout = choose_cp_layout

    @property
    def steps(self) -> int | None:
        """Number of steps without `repeat`; None with it."""
        return None if self._repeat else -(-len(self._pass) // self.global_batch_size)

    def place(self, step: int) -> int:
        """First place in the order of the samples of a step, counted from 0."""
        return self.start.place + (step - self.start.step) * self.global_batch_size

    def turns(self, step: int) -> tuple[int, ...]:
        """By source, its samples in the order before a step, those in the place of bad samples counted once."""
        return self._mixture.turns(self.place(step))

    def samples(self, step: int, bad: Collection[int] = ()) -> list[int]:
        """Dataset numbers of the samples of a step (counted from 0), in global batch order.

        A `bad` sample is replaced by the next good one in the pass over its source, so that the source keeps its share;
        without `repeat` it is left out. Raises `DataError` if a source has no good sample.
        """
        return self._choose(step, bad)[0]

    def plan(self, step: int, bad: Collection[int] = ()) -> StepManifest:
        """The manifest of a step, counted from 0, without the samples in `bad`."""
        with _collector_paused():
            return self._plan(step, bad)

    def _plan(self, step: int, bad: Collection[int]) -> StepManifest:
        indexes, skipped_samples = self._choose(step, bad)
        lengths = [int(self.dataset.lengths[index]) for index in indexes]
        sequences = self._pack(lengths) if self._packing else self._pad(lengths)
        assigned = _assign(sequences, self._lanes, self._microbatch_size, self._packing)
        place = self._place_packed if self._packing else self._place_padded
        microbatches = [
            place(indexes, lengths, lane, number, group)
            for lane, groups in enumerate(assigned)
            for number, group in enumerate(groups)
        ]
        samples = [sample for microbatch in microbatches for sample in microbatch.samples]
        media, media_costs = self._place_media(samples)
        return StepManifest(
            step,
            len(assigned[0]),
            tuple(microbatches),
            tuple(media),
            tuple(skipped_samples),
            self._imbalance(samples, media, media_costs),
        )

    def _choose(self, step: int, bad: Collection[int]) -> tuple[list[int], list[int]]:
        """The samples of a step, and the bad ones that were skipped."""
        first = self.place(step)
        if not self._repeat:
            once = self._pass[first : first + self.global_batch_size]
            return [index for index in once if index not in bad], [index for index in once if index in bad]
        chosen, skipped_samples = [], []
        for position, index in enumerate(self._mixture.samples(first, self.global_batch_size), first):
            if index in bad:
                index, bad_ones = self._replacement(position, bad)
                skipped_samples += bad_ones
            chosen.append(index)
        return chosen, skipped_samples

    def _replacement(self, position: int, bad: Collection[int]) -> tuple[int, list[int]]:
        """The next good sample in the pass over the source at a `position` of the order, and the bad ones before it."""
        skipped_samples: list[int] = []
        source, turn = self._mixture.turn(position)
        for shift in range(self.dataset.sizes[source]):
            index = self._mixture.sample(source, turn, shift)
            if index not in bad:
                return index, skipped_samples
            skipped_samples.append(index)
        raise DataError(f"all samples are bad, the last one is {self.dataset.describe(skipped_samples[-1])}")

    def _pad(self, lengths: Sequence[int]) -> list[_Sequence]:
        return [_Sequence((sample,), length, self._sample_cost(length)) for sample, length in enumerate(lengths)]

    def _pack(self, lengths: Sequence[int]) -> list[_Sequence]:
        """Packs of at most `data.seq_length` positions; a sample that exceeds it by its padding is packed alone."""
        sizes = [_round_up(length, self._row_multiple) for length in lengths]
        capacity = self.dataset.seq_length
        order = sorted(range(len(lengths)), key=lambda sample: (-sizes[sample], sample))
        costs = [self._sample_cost(length) for length in lengths]
        packs = first_fit(order, sizes, capacity)
        # Raise the number of packs to a multiple of the lanes, if there are enough samples, and make packs of about the
        # same cost: the number of microbatches stays the same, and lanes wait less for each other.
        even = even_fit(order, sizes, costs, capacity, min(_round_up(len(packs), self._lanes), len(lengths)))
        return [
            _Sequence(tuple(sorted(pack)), sum(sizes[sample] for sample in pack), sum(costs[sample] for sample in pack))
            for pack in even or packs
        ]

    def _place_padded(
        self, indexes: Sequence[int], lengths: Sequence[int], lane: int, number: int, sequences: list[_Sequence]
    ) -> Microbatch:
        samples = []
        for place, (sample,) in enumerate(sequence.samples for sequence in sequences):
            length = lengths[sample]
            samples.append(PlannedSample(sample, indexes[sample], lane, number, place, 0, length, length))
        longest = max((sample.length for sample in samples), default=0)
        return Microbatch(lane, number, len(sequences), _round_up(longest, self._row_multiple), tuple(samples))

    def _place_packed(
        self, indexes: Sequence[int], lengths: Sequence[int], lane: int, number: int, sequences: list[_Sequence]
    ) -> Microbatch:
        samples, start = [], 0
        for sample in (sample for sequence in sequences for sample in sequence.samples):
            size = _round_up(lengths[sample], self._row_multiple)
            samples.append(PlannedSample(sample, indexes[sample], lane, number, 0, start, lengths[sample], size))
            start += size
        total = _round_up(start, self._total_multiple)
        pack = Microbatch(lane, number, min(1, len(sequences)), total, tuple(samples), packed=True)
        if self._choose_cp_layout is None or pack.segment_starts is None or not samples:
            return pack
        return replace(pack, cp_layout=self._choose_cp_layout(pack.segment_starts))

    def processor(self, module: str, media_type: str) -> ItemProcessor:
        """The processor of the encoder or decoder `module` for media of a type."""
        if module in self.decoders:
            return self.decoders[module].processors[media_type]
        return self.dataset.encoder.processors[media_type]

    def modules_for(self, modality: str) -> list[str]:
        """Names of the encoder of `modality` and of the decoders that work on the same media."""
        return [modality, *(name for name, decoder in self.decoders.items() if decoder.reads == modality)]

    def _place_media(self, samples: Sequence[PlannedSample]) -> tuple[list[PlannedMedia], list[float]]:
        """Media of the step, ordered by (module, microbatch, module_lane, module_offset), and the cost of each."""
        modules = {modality: self.modules_for(modality) for modality in self._media_lanes}
        entries: dict[tuple[str, int], list[tuple[PlannedSample, int, int, int]]] = defaultdict(list)
        costs: dict[tuple[str, int], list[float]] = defaultdict(list)
        for sample in samples:
            for ordinal, item in enumerate(self.dataset.media(sample.index)):
                for module in modules[item.modality]:
                    key = module, sample.microbatch
                    entries[key].append((sample, ordinal, item.soft_tokens, item.start))
                    costs[key].append(self.processor(module, item.media_type).cost(item.header))
        media, media_costs = [], []
        loads = {module: [0.0] * lanes for module, lanes in self._media_lanes.items()}
        for module, number in sorted(entries):
            of_microbatch, their_costs = entries[module, number], costs[module, number]
            for module_lane, chosen in enumerate(balance(their_costs, loads[module])):
                offset = 0
                for sample, ordinal, soft_tokens, start in (of_microbatch[entry] for entry in chosen):
                    media.append(
                        PlannedMedia(
                            module=module, batch_index=sample.batch_index, index=sample.index, ordinal=ordinal,
                            soft_tokens=soft_tokens, lane=sample.lane, microbatch=number,
                            sequence=sample.sequence, start=sample.start + start,
                            module_lane=module_lane, module_offset=offset,
                        )
                    )  # fmt: skip
                    offset += soft_tokens
                media_costs += [their_costs[entry] for entry in chosen]
        return media, media_costs

    def _imbalance(
        self, samples: Sequence[PlannedSample], media: Sequence[PlannedMedia], media_costs: Sequence[float]
    ) -> dict[str, Imbalance]:
        loads = {module: _Loads(lanes) for module, lanes in (("language", self._lanes), *self._media_lanes.items())}
        for sample in samples:
            loads["language"].add(self._sample_cost(sample.length), sample.batch_index, sample.lane)
        for item, cost in zip(media, media_costs, strict=True):
            loads[item.module].add(cost, item.batch_index, item.module_lane)
        return {module: load.imbalance for module, load in loads.items()}


def _assign(
    sequences: Sequence[_Sequence], lanes: int, microbatch_size: int, packing: bool
) -> list[list[list[_Sequence]]]:
    """Sequences as [lane][microbatch][sequence]. All lanes have the same number of microbatches; some may be empty.

    Sequences of similar cost get the same microbatch number, so that lanes take the same time and padding is short. The
    costliest microbatch of a number goes to the lane with the lowest cost so far.
    """
    ordered = sorted(sequences, key=lambda sequence: (-sequence.cost, sequence.samples))
    num_microbatches = -(-len(ordered) // (lanes * microbatch_size))
    assigned: list[list[list[_Sequence]]] = [[] for _ in range(lanes)]
    load = [0.0] * lanes
    for number in range(num_microbatches):
        pool = ordered[number * lanes * microbatch_size : (number + 1) * lanes * microbatch_size]
        groups = _deal(pool, lanes) if packing else _split(pool, lanes)
        costs = [_cost(group, packing) for group in groups]
        by_cost = sorted(range(lanes), key=lambda group: (-costs[group], group))
        by_load = sorted(range(lanes), key=lambda lane: (load[lane], lane))
        for lane, group in zip(by_load, by_cost, strict=True):
            assigned[lane].append(groups[group])
            load[lane] += costs[group]
    return assigned


def _cost(sequences: list[_Sequence], packing: bool) -> float:
    """Cost of a microbatch: packs are joined, other sequences padded to the longest."""
    costs = [sequence.cost for sequence in sequences]
    return sum(costs) if packing else len(costs) * max(costs, default=0.0)


def _deal(sequences: list[_Sequence], parts: int) -> list[list[_Sequence]]:
    """Parts of about equal cost and at most equal size: each sequence, costliest first, goes to the cheapest part."""
    most = -(-len(sequences) // parts)
    dealt: list[list[_Sequence]] = [[] for _ in range(parts)]
    cheapest = [(0.0, 0, number) for number in range(parts)]  # heap of (cost, size, number): the parts with room
    for sequence in sequences:
        number = cheapest[0][2]
        part = dealt[number]
        part.append(sequence)
        if len(part) < most:
            heapreplace(cheapest, (_cost(part, packing=True), len(part), number))
        else:
            heappop(cheapest)
    return dealt


def _split(sequences: list[_Sequence], parts: int) -> list[list[_Sequence]]:
    """Consecutive parts whose sizes differ by at most one; the smaller ones come first, with the longer sequences."""
    size, larger = divmod(len(sequences), parts)
    bounds = [part * size + max(0, part - (parts - larger)) for part in range(parts + 1)]
    return [sequences[begin:end] for begin, end in zip(bounds, bounds[1:], strict=False)]


class _Loads:
    """Cost of each of a module's lanes."""

    def __init__(self, lanes: int) -> None:
        """Start with lanes that have nothing to do."""
        self._lanes, self._before, self._after = lanes, [0.0] * lanes, [0.0] * lanes

    def add(self, cost: float, batch_index: int, lane: int) -> None:
        """Add a sample or media item: its place in the global batch, and the lane that it has in the plan."""
        self._before[batch_index % self._lanes] += cost
        self._after[lane] += cost

    @property
    def imbalance(self) -> Imbalance:
        """Without and with the plan."""
        mean = sum(self._after) / self._lanes
        return Imbalance(max(self._before) / mean, max(self._after) / mean) if mean else Imbalance(1.0, 1.0)


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Without Python's cyclic garbage collector: a plan makes no cycles, but so many objects that they start it.

    To search all objects of a training process takes longer than to plan.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple

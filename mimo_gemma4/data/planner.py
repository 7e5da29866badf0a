"""Plans global steps: where every sample is trained on, and where every media item is encoded or decoded.

A plan is a pure function of (dataset, seed, step, lanes, bad samples), so it is the same on every rank. The samples of
a step depend only on (seed, global index) and on which samples are bad; their places depend on the layout.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from heapq import heapify, heappop, heappush, heapreplace
from operator import itemgetter
from typing import Literal

from mimo_gemma4.data.dataset import MediaItem, ShardDataset
from mimo_gemma4.data.manifest import Imbalance, Microbatch, PlannedMedia, PlannedSample, StepManifest
from mimo_gemma4.data.order import Mixture
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
            limit: length of that pass: only the first `limit` samples of the dataset.
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
        self.count = len(dataset) if limit is None else min(limit, len(dataset))
        """Number of samples of one pass."""
        self.global_batch_size = global_batch_size
        self._microbatch_size, self._repeat, self._sample_cost = microbatch_size, repeat, sample_cost
        self._mixture = Mixture(dataset.sizes, dataset.weights, seed=seed, shuffle=shuffle)
        self._lanes = language_lanes
        self._packing, self._row_multiple, self._total_multiple = packing, row_multiple, total_multiple
        self._choose_cp_layout = choose_cp_layout

    @property
    def steps(self) -> int | None:
        """Number of steps without `repeat`; None with it."""
        return None if self._repeat else -(-self.count // self.global_batch_size)

    def samples(self, step: int, bad: Collection[int] = ()) -> list[int]:
        """Dataset numbers of the samples of a step (counted from 0), in global batch order.

        A `bad` sample is replaced by the next good one in the pass over its source, so that the source keeps its share;
        without `repeat` it is left out. Raises `DataError` if a source has no good sample.
        """
        return self._choose(step, bad)[0]

    def plan(self, step: int, bad: Collection[int] = ()) -> StepManifest:
        """The manifest of a step, counted from 0, without the samples in `bad`."""
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
        media = self._place_media(samples)
        return StepManifest(
            step,
            len(assigned[0]),
            tuple(microbatches),
            tuple(media),
            tuple(skipped_samples),
            self._imbalance(samples, media),
        )

    def _choose(self, step: int, bad: Collection[int]) -> tuple[list[int], list[int]]:
        """The samples of a step, and the bad ones that were skipped."""
        first = step * self.global_batch_size
        if not self._repeat:
            once = range(first, min(first + self.global_batch_size, self.count))
            return [index for index in once if index not in bad], [index for index in once if index in bad]
        chosen, skipped_samples = [], []
        for position in range(first, first + self.global_batch_size):
            source, turn = self._mixture.turn(position)
            for shift in range(self.dataset.sizes[source]):
                index = self._mixture.sample(source, turn, shift)
                if index not in bad:
                    chosen.append(index)
                    break
                skipped_samples.append(index)
            else:
                raise DataError(f"all samples are bad, the last one is {self.dataset.describe(skipped_samples[-1])}")
        return chosen, skipped_samples

    def _pad(self, lengths: Sequence[int]) -> list[_Sequence]:
        return [_Sequence((sample,), length, self._sample_cost(length)) for sample, length in enumerate(lengths)]

    def _pack(self, lengths: Sequence[int]) -> list[_Sequence]:
        """Packs of at most `data.seq_length` positions; a sample that exceeds it by its padding is packed alone."""
        sizes = [_round_up(length, self._row_multiple) for length in lengths]
        capacity = self.dataset.seq_length
        order = sorted(range(len(lengths)), key=lambda sample: (-sizes[sample], sample))
        costs = [self._sample_cost(length) for length in lengths]
        packs = _first_fit(order, sizes, capacity)
        # Raise the number of packs to a multiple of the lanes, if there are enough samples, and make packs of about the
        # same cost: the number of microbatches stays the same, and lanes wait less for each other.
        even = _even_fit(order, sizes, costs, capacity, min(_round_up(len(packs), self._lanes), len(lengths)))
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

    def _place_media(self, samples: Sequence[PlannedSample]) -> list[PlannedMedia]:
        """Media of the step, ordered by (module, microbatch, module_lane, module_offset)."""
        by_microbatch: dict[tuple[str, int], list[tuple[PlannedSample, int, MediaItem]]] = defaultdict(list)
        for sample in samples:
            for ordinal, item in enumerate(self.dataset.media(sample.index)):
                for module in self.modules_for(item.modality):
                    by_microbatch[module, sample.microbatch].append((sample, ordinal, item))
        media = []
        loads = {module: [0.0] * lanes for module, lanes in self._media_lanes.items()}
        for (module, number), entries in sorted(by_microbatch.items(), key=itemgetter(0)):
            costs = [self.processor(module, item.media_type).cost(item.header) for _, _, item in entries]
            for module_lane, chosen in enumerate(_balance(costs, loads[module])):
                offset = 0
                for sample, ordinal, item in (entries[entry] for entry in chosen):
                    media.append(
                        PlannedMedia(
                            module=module, batch_index=sample.batch_index, index=sample.index, ordinal=ordinal,
                            soft_tokens=item.soft_tokens, lane=sample.lane, microbatch=number,
                            sequence=sample.sequence, start=sample.start + item.start,
                            module_lane=module_lane, module_offset=offset,
                        )
                    )  # fmt: skip
                    offset += item.soft_tokens
        return media

    def _imbalance(self, samples: Sequence[PlannedSample], media: Sequence[PlannedMedia]) -> dict[str, Imbalance]:
        trained = (
            (self._sample_cost(sample.length), sample.batch_index % self._lanes, sample.lane) for sample in samples
        )
        imbalance = {"language": _imbalance(self._lanes, trained)}
        costs: dict[str, list[tuple[float, int, int]]] = defaultdict(list)
        for item in media:
            file = self.dataset.media(item.index)[item.ordinal]
            cost = self.processor(item.module, file.media_type).cost(file.header)
            costs[item.module].append((cost, item.batch_index % self._media_lanes[item.module], item.module_lane))
        for module, lanes in self._media_lanes.items():
            imbalance[module] = _imbalance(lanes, costs[module])
        return imbalance


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


class _Bins:
    """Bins for items of decreasing size: finds the bin with the lowest key that has room, in O(log bins).

    A bin that is too full for an item waits, in a heap by free space, until the items are small enough for it.
    """

    def __init__(self) -> None:
        """Start without bins."""
        self._ready: list[tuple[float, int, float]] = []  # heap of (key, number, free)
        self._waiting: list[tuple[float, float, int]] = []  # heap of (-free, key, number)

    def add(self, key: float, number: int, free: float) -> None:
        """Add a bin, or give back one that was taken."""
        heappush(self._ready, (key, number, free))

    def take(self, size: int) -> int | None:
        """Remove the bin with at least `size` free whose (key, number) is lowest; its number, None if no bin has room.

        `size` must not exceed that of any earlier call.
        """
        ready, waiting = self._ready, self._waiting
        while waiting and -waiting[0][0] >= size:
            negative, key, number = heappop(waiting)
            heappush(ready, (key, number, -negative))
        while ready:
            key, number, free = heappop(ready)
            if free >= size:
                return number
            heappush(waiting, (-free, key, number))
        return None


def _first_fit(order: Sequence[int], sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Packs by first fit; `order` is by decreasing size. A larger sample than `capacity` is packed alone."""
    packs: list[list[int]] = []
    free: list[int] = []
    bins = _Bins()
    for sample in order:
        pack = bins.take(sizes[sample])
        if pack is None:
            pack = len(packs)
            packs.append([])
            free.append(capacity)
        packs[pack].append(sample)
        free[pack] -= sizes[sample]
        bins.add(pack, pack, free[pack])
    return packs


def _even_fit(
    order: Sequence[int], sizes: Sequence[int], costs: Sequence[float], capacity: int, count: int
) -> list[list[int]] | None:
    """`count` packs: each sample, largest first, goes into the cheapest pack that has room. None if none has.

    A sample that exceeds the capacity by its padding goes into an empty pack.
    """
    packs: list[list[int]] = [[] for _ in range(count)]
    free, cost = [capacity] * count, [0.0] * count
    bins = _Bins()
    for pack in range(count):
        bins.add(0.0, pack, math.inf)
    for sample in order:
        pack = bins.take(sizes[sample])
        if pack is None:
            return None
        packs[pack].append(sample)
        free[pack] -= sizes[sample]
        cost[pack] += costs[sample]
        bins.add(cost[pack], pack, free[pack])
    return packs


def _imbalance(self, samples: Sequence[PlannedSample], media: Sequence[PlannedMedia]) -> dict[str, Imbalance]:
        trained = (
            (self._sample_cost(sample.length), sample.batch_index % self._lanes, sample.lane) for sample in samples
        )
        imbalance = {"language": _imbalance(self._lanes, trained)}
        costs: dict[str, list[tuple[float, int, int]]] = defaultdict(list)
        for item in media:
            file = self.dataset.media(item.index)[item.ordinal]
            cost = self.processor(item.module, file.media_type).cost(file.header)
            costs[item.module].append((cost, item.batch_index % self._media_lanes[item.module], item.module_lane))
        for module, lanes in self._media_lanes.items():
            imbalance[module] = _imbalance(lanes, costs[module])
        return imbalance


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


def _first_fit(order: Sequence[int], sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Packs by first fit in the given (decreasing) order."""
    packs: list[list[int]] = []
    free: list[int] = []
    for sample in order:
        pack = next((number for number, left in enumerate(free) if left >= sizes[sample]), None)
        if pack is None:
            packs.append([])
            free.append(capacity)
            pack = len(packs) - 1
        packs[pack].append(sample)
        free[pack] -= sizes[sample]
    return packs


def _even_fit(
    order: Sequence[int], sizes: Sequence[int], costs: Sequence[float], capacity: int, count: int
) -> list[list[int]] | None:
    """`count` packs: each sample goes into the cheapest one that has room. None if a sample fits in no pack.

    A sample that exceeds the capacity by its padding goes into an empty pack.
    """
    packs: list[list[int]] = [[] for _ in range(count)]
    filled, cost = [0] * count, [0.0] * count
    for sample in order:
        room = [pack for pack in range(count) if not packs[pack] or filled[pack] + sizes[sample] <= capacity]
        if not room:
            return None
        pack = min(room, key=cost.__getitem__)
        packs[pack].append(sample)
        filled[pack] += sizes[sample]
        cost[pack] += costs[sample]
    return packs


def _imbalance(lanes: int, costs: Iterable[tuple[float, int, int]]) -> Imbalance:
    """Imbalance of samples or media items, each given as (cost, lane in turn, lane of the plan)."""
    before, after = [0.0] * lanes, [0.0] * lanes
    for cost, lane_in_turn, lane in costs:
        before[lane_in_turn] += cost
        after[lane] += cost
    mean = sum(after) / lanes
    return Imbalance(max(before) / mean, max(after) / mean) if mean else Imbalance(1.0, 1.0)


def _balance(costs: Sequence[float], load: list[float]) -> list[list[int]]:
    """Numbers of every lane's entries, in order: costliest first, each to the lane with the lowest load.

    `load` is the cost of each lane in the step's earlier microbatches; the entries' costs are added to it.
    """
    chosen: list[list[int]] = [[] for _ in load]
    lowest = [(cost, lane) for lane, cost in enumerate(load)]
    heapify(lowest)
    for entry in sorted(range(len(costs)), key=lambda entry: (-costs[entry], entry)):
        lane = lowest[0][1]
        chosen[lane].append(entry)
        load[lane] += costs[entry]
        heapreplace(lowest, (load[lane], lane))
    return [sorted(entries) for entries in chosen]


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple

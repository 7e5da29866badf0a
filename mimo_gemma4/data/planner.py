"""Plans global steps: which sample is trained on where, and which media item is encoded where.

A plan is a pure function of (dataset, seed, step, lanes, bad samples), computed alike on every rank. The samples of a
step depend on (seed, global index) and on which samples are bad only; where they go depends on the layout.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from mimo_gemma4.data.dataset import MediaItem, ShardDataset
from mimo_gemma4.data.manifest import Imbalance, Microbatch, PlannedMedia, PlannedSample, StepManifest
from mimo_gemma4.data.order import Mixture
from mimo_gemma4.errors import ConfigError, DataError
from mimo_gemma4.media import ItemProcessor


@dataclass(frozen=True)
class DecoderTargets:
    """Which media a decoder works on, and what makes its targets of them."""

    reads: str
    """Modality of the media."""
    lanes: int
    """Data-parallel lanes of the decoder."""
    processors: Mapping[str, ItemProcessor]
    """By media type, each of that modality's."""


@dataclass(frozen=True)
class _Row:
    """Samples that share a row of a microbatch: one when padded, a pack when packed."""

    samples: tuple[int, ...]
    """Positions in the global batch."""
    size: int
    """Positions that the row takes."""
    cost: float
    """What training on it costs the language model."""


class StepPlanner:
    """Gives the manifest of any global step, in any order, at a cost that does not grow with the step."""

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
        """Plan for `language_lanes` data-parallel lanes of the language model and `encoder_lanes` per modality.

        `decoders`: what further modules do with the media, by name.
        `row_multiple`: padded, what the length of a microbatch is rounded up to; packed, what every sample of a pack is
        padded to. `total_multiple`: packed, what the length of a microbatch is rounded up to by padding at its end.
        `sample_cost`: what a sample of so many tokens costs the language model, up to a factor; lanes are given equally
        much. `shuffle`: a new order in every pass over a source, instead of shard order. `repeat=False`: one pass over
        all sources in shard order, without bad samples, the last batch as long as the samples reach; otherwise sources
        are mixed by weight without end. `limit`: of one pass, only so many samples, the first of the dataset.
        `choose_cp_layout`: how context parallel ranks share a pack with these segment starts; None: zigzag.

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
        """Samples of one pass."""
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

        The place of a `bad` one is taken by the next of its source's pass that is not, so that a source keeps its
        share; in one pass over the data it stays empty. Raises `DataError` where a source has no other sample.
        """
        return self._choose(step, bad)[0]

    def plan(self, step: int, bad: Collection[int] = ()) -> StepManifest:
        """The manifest of a step, counted from 0, without the samples that are known to be `bad`."""
        indexes, skipped_samples = self._choose(step, bad)
        lengths = [int(self.dataset.lengths[index]) for index in indexes]
        rows = self._pack(lengths) if self._packing else self._pad(lengths)
        assigned = _assign(rows, self._lanes, self._microbatch_size, self._packing)
        place = self._place_packed if self._packing else self._place_padded
        microbatches = [
            place(indexes, lengths, lane, number, group)
            for lane, groups in enumerate(assigned)
            for number, group in enumerate(groups)
        ]
        samples = [planned for microbatch in microbatches for planned in microbatch.samples]
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
        """The samples of a step, and the bad ones that were passed over for them."""
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

    def _pad(self, lengths: Sequence[int]) -> list[_Row]:
        return [_Row((sample,), length, self._sample_cost(length)) for sample, length in enumerate(lengths)]

    def _pack(self, lengths: Sequence[int]) -> list[_Row]:
        """Packs of at most `data.seq_length` positions; a sample whose padding exceeds that has a pack to itself."""
        sizes = [_round_up(length, self._row_multiple) for length in lengths]
        capacity = self.dataset.seq_length
        order = sorted(range(len(lengths)), key=lambda sample: (-sizes[sample], sample))
        costs = [self._sample_cost(length) for length in lengths]
        packs = _first_fit(order, sizes, capacity)
        # As many packs for every lane, if there are samples enough, and all packs about as costly: the same number of
        # microbatches, but no lane that waits for another.
        even = _even_fit(order, sizes, costs, capacity, min(_round_up(len(packs), self._lanes), len(lengths)))
        return [
            _Row(tuple(sorted(pack)), sum(sizes[sample] for sample in pack), sum(costs[sample] for sample in pack))
            for pack in even or packs
        ]

    def _place_padded(
        self, indexes: Sequence[int], lengths: Sequence[int], lane: int, number: int, rows: Sequence[_Row]
    ) -> Microbatch:
        samples = []
        for row, (sample,) in enumerate(row.samples for row in rows):
            length = lengths[sample]
            samples.append(PlannedSample(sample, indexes[sample], lane, number, row, 0, length, length))
        longest = max((planned.length for planned in samples), default=0)
        return Microbatch(lane, number, len(rows), _round_up(longest, self._row_multiple), tuple(samples))

    def _place_packed(
        self, indexes: Sequence[int], lengths: Sequence[int], lane: int, number: int, rows: Sequence[_Row]
    ) -> Microbatch:
        samples, start = [], 0
        for sample in (sample for row in rows for sample in row.samples):
            size = _round_up(lengths[sample], self._row_multiple)
            samples.append(PlannedSample(sample, indexes[sample], lane, number, 0, start, lengths[sample], size))
            start += size
        total = _round_up(start, self._total_multiple)
        pack = Microbatch(lane, number, min(1, len(rows)), total, tuple(samples), packed=True)
        if self._choose_cp_layout is None or pack.segment_starts is None or not samples:
            return pack
        return replace(pack, cp_layout=self._choose_cp_layout(pack.segment_starts))

    def processor(self, module: str, media_type: str) -> ItemProcessor:
        """What the encoder or decoder `module` reads media of a type with."""
        if module in self.decoders:
            return self.decoders[module].processors[media_type]
        return self.dataset.encoder.processors[media_type]

    def modules_for(self, modality: str) -> list[str]:
        """The encoder of `modality`, and the decoders that read it."""
        return [modality, *(name for name, decoder in self.decoders.items() if decoder.reads == modality)]

    def _place_media(self, samples: Sequence[PlannedSample]) -> list[PlannedMedia]:
        """Media of the step, ordered by (module, microbatch, lane of the module, offset)."""
        rounds: dict[tuple[str, int], list[tuple[PlannedSample, int, MediaItem]]] = {}
        for planned in samples:
            for ordinal, item in enumerate(self.dataset.media(planned.index)):
                for module in self.modules_for(item.modality):
                    rounds.setdefault((module, planned.microbatch), []).append((planned, ordinal, item))
        media = []
        loads = {module: [0.0] * lanes for module, lanes in self._media_lanes.items()}
        for module, number in sorted(rounds):
            entries = rounds[module, number]
            costs = [self.processor(module, item.media_type).cost(item.header) for _, _, item in entries]
            for module_lane, chosen in enumerate(_balance(costs, loads[module])):
                offset = 0
                for planned, ordinal, item in (entries[entry] for entry in chosen):
                    media.append(
                        PlannedMedia(
                            module=module, batch_index=planned.batch_index, index=planned.index, ordinal=ordinal,
                            soft_tokens=item.soft_tokens, lane=planned.lane, microbatch=number,
                            sequence=planned.sequence, start=planned.start + item.start,
                            module_lane=module_lane, module_offset=offset,
                        )
                    )  # fmt: skip
                    offset += item.soft_tokens
        return media

    def _imbalance(self, samples: Sequence[PlannedSample], media: Sequence[PlannedMedia]) -> dict[str, Imbalance]:
        trained = (
            (self._sample_cost(planned.length), planned.batch_index % self._lanes, planned.lane) for planned in samples
        )
        imbalance = {"language": _imbalance(self._lanes, trained)}
        costs: dict[str, list[tuple[float, int, int]]] = defaultdict(list)
        for planned in media:
            item = self.dataset.media(planned.index)[planned.ordinal]
            cost = self.processor(planned.module, item.media_type).cost(item.header)
            costs[planned.module].append(
                (cost, planned.batch_index % self._media_lanes[planned.module], planned.module_lane)
            )
        for module, lanes in self._media_lanes.items():
            imbalance[module] = _imbalance(lanes, costs[module])
        return imbalance


def _assign(rows: Sequence[_Row], lanes: int, microbatch_size: int, packing: bool) -> list[list[list[_Row]]]:
    """Rows of every lane's microbatches, [lane][microbatch][row]; all lanes have equally many, some may be empty.

    Rows of like cost meet in one round, so that lanes take as long as each other in it and padding is short; within a
    round the costliest microbatch goes to the lane with the least so far.
    """
    ordered = sorted(rows, key=lambda row: (-row.cost, row.samples))
    rounds = -(-len(ordered) // (lanes * microbatch_size))
    assigned: list[list[list[_Row]]] = [[] for _ in range(lanes)]
    load = [0.0] * lanes
    for number in range(rounds):
        pool = ordered[number * lanes * microbatch_size : (number + 1) * lanes * microbatch_size]
        groups = _deal(pool, lanes) if packing else _split(pool, lanes)
        costs = [_cost(group, packing) for group in groups]
        by_cost = sorted(range(lanes), key=lambda group: (-costs[group], group))
        by_load = sorted(range(lanes), key=lambda lane: (load[lane], lane))
        for lane, group in zip(by_load, by_cost, strict=True):
            assigned[lane].append(groups[group])
            load[lane] += costs[group]
    return assigned


def _cost(rows: Sequence[_Row], packing: bool) -> float:
    """Cost of a microbatch: packs are joined, other rows padded to the longest."""
    costs = [row.cost for row in rows]
    return sum(costs) if packing else len(costs) * max(costs, default=0.0)


def _deal(rows: Sequence[_Row], parts: int) -> list[list[_Row]]:
    """Parts of equal cost, as far as none takes more rows than its share: costliest first, each to the cheapest."""
    most = -(-len(rows) // parts)
    dealt: list[list[_Row]] = [[] for _ in range(parts)]
    for row in rows:
        open_parts = [part for part in dealt if len(part) < most]
        min(open_parts, key=lambda part: (_cost(part, True), len(part))).append(row)
    return dealt


def _split(rows: list[_Row], parts: int) -> list[list[_Row]]:
    """Consecutive parts whose sizes differ by one at most, the smaller ones first: there the longer rows are."""
    size, larger = divmod(len(rows), parts)
    bounds = [part * size + max(0, part - (parts - larger)) for part in range(parts + 1)]
    return [rows[begin:end] for begin, end in zip(bounds, bounds[1:], strict=False)]


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
    """`count` packs, each sample into the cheapest one with room for it; None where there is none.

    A sample that exceeds the capacity by its padding takes an empty pack.
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
    """Of (cost, lane in turn, planned lane) of every sample or item."""
    before, after = [0.0] * lanes, [0.0] * lanes
    for cost, in_turn, planned in costs:
        before[in_turn] += cost
        after[planned] += cost
    mean = sum(after) / lanes
    return Imbalance(max(before) / mean, max(after) / mean) if mean else Imbalance(1.0, 1.0)


def _balance(costs: Sequence[float], load: list[float]) -> list[list[int]]:
    """Entries of every lane, in entry order: longest processing time first, each to the lane with the least so far.

    `load` is what the lanes have been given in earlier rounds of the step; it is brought up to date.
    """
    lanes = len(load)
    chosen: list[list[int]] = [[] for _ in range(lanes)]
    for entry in sorted(range(len(costs)), key=lambda entry: (-costs[entry], entry)):
        lane = min(range(lanes), key=load.__getitem__)
        chosen[lane].append(entry)
        load[lane] += costs[entry]
    return [sorted(entries) for entries in chosen]


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple

"""Fills packs and lanes so that all cost about the same, in O(log n) per item."""

import math
from collections.abc import Sequence
from heapq import heapify, heappop, heappush, heapreplace


class Bins:
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


def first_fit(order: Sequence[int], sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Packs by first fit; `order` is by decreasing size. A larger sample than `capacity` is packed alone."""
    packs: list[list[int]] = []
    free: list[int] = []
    bins = Bins()
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


def even_fit(
    order: Sequence[int], sizes: Sequence[int], costs: Sequence[float], capacity: int, count: int
) -> list[list[int]] | None:
    """`count` packs: each sample, largest first, goes into the cheapest pack that has room. None if none has.

    A sample that exceeds the capacity by its padding goes into an empty pack.
    """
    packs: list[list[int]] = [[] for _ in range(count)]
    free, cost = [capacity] * count, [0.0] * count
    bins = Bins()
    for number in range(count):
        bins.add(0.0, number, math.inf)
    for sample in order:
        pack = bins.take(sizes[sample])
        if pack is None:
            return None
        packs[pack].append(sample)
        free[pack] -= sizes[sample]
        cost[pack] += costs[sample]
        bins.add(cost[pack], pack, free[pack])
    return packs


def balance(costs: Sequence[float], load: list[float]) -> list[list[int]]:
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

"""Cuts consecutive layers into pipeline stages: pure Python, the same for the language model and the encoders."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True)
class Stage:
    """The layers of one pipeline stage."""

    layers: range
    """Numbers of its layers."""
    total: int
    """Layers of the whole module."""

    @property
    def first(self) -> bool:
        """Whether it also holds what comes before the layers, such as embeddings."""
        return self.layers.start == 0

    @property
    def last(self) -> bool:
        """Whether it also holds what comes after the layers, such as the head."""
        return self.layers.stop == self.total

    @classmethod
    def whole(cls, total: int) -> Self:
        """The only stage of a module without a pipeline."""
        return cls(range(total), total)


def cut_evenly(costs: Sequence[float], stages: int, cuts: Sequence[int] | None = None) -> tuple[int, ...]:
    """Cut layers of these costs into stages by dynamic programming: the stages' bounds, from 0 to the number of layers.

    The costliest stage is as cheap as possible, and so is the costliest of the stages before any bound; ties go to the
    smaller sum of squared costs.

    Args:
        costs: cost of each layer.
        stages: number of stages.
        cuts: layers that a stage after the first may begin with, at least `stages - 1` of them; None: all.
    """
    count = len(costs)
    points = [0, *(range(1, count) if cuts is None else cuts), count]
    best: dict[int, tuple[float, float, tuple[int, ...]]] = {0: (0.0, 0.0, (0,))}
    for _ in range(stages):
        following: dict[int, tuple[float, float, tuple[int, ...]]] = {}
        for stop in points:
            found = [_extended(best[start], sum(costs[start:stop]), stop) for start in best if start < stop]
            if found:
                following[stop] = min(found)
        best = following
    return best[count][2]


def _extended(
    part: tuple[float, float, tuple[int, ...]], cost: float, stop: int
) -> tuple[float, float, tuple[int, ...]]:
    """(largest cost, sum of squared costs, bounds) with one more stage, which ends at `stop`."""
    largest, squares, bounds = part
    return max(largest, cost), squares + cost**2, (*bounds, stop)

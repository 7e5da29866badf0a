"""How consecutive layers become pipeline stages: pure Python, the same for the language model and the encoders."""

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
        """Whether it has what lies before the layers."""
        return self.layers.start == 0

    @property
    def last(self) -> bool:
        """Whether it has what lies behind the layers."""
        return self.layers.stop == self.total

    @classmethod
    def whole(cls, total: int) -> Self:
        """The only stage of a module without pipeline."""
        return cls(range(total), total)


def cut_evenly(costs: Sequence[float], stages: int, cuts: Sequence[int] | None = None) -> tuple[int, ...]:
    """Bounds of `stages` stages of layers that cost so much, from 0 to their number, by dynamic programming.

    The costliest stage is as cheap as it can be, and the stages before any other are cut in the same way. `cuts` are
    the layers that a stage after the first may begin with, at least `stages - 1` of them; None: all.
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
    largest, squares, bounds = part
    return max(largest, cost), squares + cost**2, (*bounds, stop)

"""Rows: what a source of any kind is read as, one dictionary per sample to be."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, Protocol, Self

from mimo_gemma4.data.sample import BadSampleError

Row = Mapping[str, Any]
"""Columns of one record: text, numbers, bytes, lists and dictionaries of them."""


class Rows(Protocol):
    """Part of a source: consecutive rows, small to send to another process, read where they are iterated over."""

    def __len__(self) -> int:
        """Number of rows."""
        ...

    def __iter__(self) -> Iterator[tuple[str, Row | BadSampleError]]:
        """Each row, or why it cannot be read, behind the name by which its source knows it."""
        ...

    def cut(self, start: int, stop: int) -> Self:
        """Rows `start` … `stop` - 1 of these."""
        ...

    @property
    def version(self) -> str:
        """Another text once what is read has changed."""
        ...


def cut_evenly(parts: Sequence[Rows], size: int) -> list[tuple[Rows, ...]]:
    """The rows of all parts, in order, in runs of `size` rows (the last may be shorter)."""
    total = sum(len(part) for part in parts)
    runs = []
    for start, stop in pairwise([*range(0, total, size), total]):
        run, position = [], 0
        for part in parts:
            first, last = max(start - position, 0), min(stop - position, len(part))
            if first < last:
                run.append(part.cut(first, last))
            position += len(part)
        runs.append(tuple(run))
    return runs

"""Rows, the common form of all sources: one dictionary per sample."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, Protocol, Self

from mimo_gemma4.data.sample import BadSampleError

Row = Mapping[str, Any]
"""One record by column: text, numbers, bytes, and lists and dictionaries of them."""


class Rows(Protocol):
    """Consecutive rows of a source. They are read during iteration, so the object is small to send to a process."""

    def __len__(self) -> int:
        """Number of rows."""
        ...

    def __iter__(self) -> Iterator[tuple[str, Row | BadSampleError]]:
        """(Name in reports, row) of every row; an error in place of a row that cannot be read."""
        ...

    def cut(self, start: int, stop: int) -> Self:
        """Rows `start` … `stop` - 1."""
        ...

    @property
    def version(self) -> str:
        """A text that changes with the files behind the rows."""
        ...


def cut_evenly(parts: Sequence[Rows], size: int) -> list[tuple[Rows, ...]]:
    """Cut the rows of all parts, in order, into runs of `size` rows; the last run may be shorter."""
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

"""Axis-aligned boxes of tensor indices, to compare runs of flattened elements, bindings and stored slices."""

import math

from mimo_gemma4.weights.bindings import Index

Box = Index
"""One bounded, step-free slice per dimension."""


def size(box: Box) -> int:
    """Number of elements."""
    return math.prod(cut.stop - cut.start for cut in box)


def intersect(one: Box, other: Box) -> Box | None:
    """The common box of two boxes of the same tensor; None where they do not overlap."""
    common = tuple(slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(one, other, strict=True))
    return None if any(cut.start >= cut.stop for cut in common) else common


def translate(box: Box, source: Box, target: Box | None = None) -> Box:
    """`box`, a part of `source`, at the same place in `target`; without `target`, relative to the start of `source`."""
    shifts = [(0 if target is None else target[i].start) - cut.start for i, cut in enumerate(source)]
    return tuple(slice(cut.start + shift, cut.stop + shift) for cut, shift in zip(box, shifts, strict=True))


def rectangles(shape: tuple[int, ...], start: int, end: int) -> list[Box]:
    """The elements `[start, end)` of a row-major tensor as boxes, at most 2 * dimensions - 1, in order.

    A run begins in the middle of a row, covers whole rows, and ends in the middle of a row; its parts of the first and
    the last row are runs in turn. Each box is contiguous in the flattened tensor.
    """
    if start >= end:
        return []
    if not shape:
        return [()]
    row = math.prod(shape[1:])
    first, last = -(-start // row), end // row  # the whole rows

    def within(number: int, lower: int, upper: int) -> list[Box]:
        inner = rectangles(shape[1:], lower - number * row, upper - number * row)
        return [(slice(number, number + 1), *box) for box in inner]

    if first > last:
        return within(last, start, end)
    boxes = within(first - 1, start, first * row) if start < first * row else []
    if first < last:
        boxes.append((slice(first, last), *(slice(0, length) for length in shape[1:])))
    return boxes + (within(last, last * row, end) if last * row < end else [])

"""A run of flattened elements is cut into few boxes that hold exactly its elements, in order."""

import itertools
import math

import pytest
import torch

from mimo_gemma4.checkpoint.boxes import intersect, rectangles, size, translate


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 4), (5, 1), (1, 5), (2, 3, 4), (2, 1, 3, 2)])
def test_boxes_hold_the_run_in_order(shape):
    count = math.prod(shape)
    numbers = torch.arange(count).view(shape)
    for start, end in itertools.combinations_with_replacement(range(count + 1), 2):
        boxes = rectangles(shape, start, end)
        held = [numbers[box].reshape(-1) for box in boxes]
        assert torch.cat([torch.empty(0, dtype=torch.int64), *held]).tolist() == list(range(start, end))
        assert len(boxes) <= max(1, 2 * len(shape) - 1)
        assert sum(map(size, boxes)) == end - start


def test_common_box_and_its_places():
    stored, wanted = (slice(0, 4), slice(2, 6)), (slice(3, 8), slice(0, 3))
    common = intersect(stored, wanted)
    assert common == (slice(3, 4), slice(2, 3))
    assert translate(common, stored) == (slice(3, 4), slice(0, 1))
    assert translate(common, stored, wanted) == (slice(6, 7), slice(0, 1))
    assert intersect((slice(0, 2),), (slice(2, 4),)) is None

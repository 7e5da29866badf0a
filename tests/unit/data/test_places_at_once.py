"""The samples of a stretch of the order, computed at once, are exactly those of its single places."""

import numpy as np
import pytest

from mimo_gemma4.data.order import Mixture, Permutation


@pytest.mark.parametrize("size", [1, 2, 33, 1000, 4097, 65_537])
def test_images_of_many_places_are_those_of_each(size):
    permutation = Permutation(size, 3)
    places = np.random.default_rng(0).permutation(size)[:3000]
    assert permutation.images(places).tolist() == [permutation(place) for place in places.tolist()]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("sizes, weights", [((5,), (1.0,)), ((40, 7, 230), (3.0, 1.0, 0.5)), ((4097,), (1.0,))])
def test_a_stretch_of_the_order_is_that_of_its_places(sizes, weights, shuffle):
    """Stretches shorter and longer than passes, that begin within one; the last lies 10^12 places on."""
    first_turns = [3 * size + 2 for size in sizes]
    mixture = Mixture(sizes, weights, seed=2, shuffle=shuffle, first_turns=first_turns)
    for start, count in ((0, 1), (11, 300), (4000, 500), (10**12, 200)):
        single = [mixture.sample(*mixture.turn(place)) for place in range(start, start + count)]
        assert mixture.samples(start, count) == single

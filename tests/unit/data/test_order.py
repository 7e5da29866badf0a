"""The endless order is a pure function of the place: permutations without tables, sources mixed by weight."""

import time
from collections import Counter

import pytest

from mimo_gemma4.data.order import Mixture, Permutation, take_of_each


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 1000, 4097])
def test_a_permutation_takes_every_number_once(size):
    orders = []
    for key in range(3):
        permutation = Permutation(size, key, 7)
        orders.append([permutation(place) for place in range(size)])
        assert sorted(orders[-1]) == list(range(size))
    if size >= 16:
        assert orders[0] != orders[1] != orders[2] != list(range(size))


def test_small_permutations_are_about_equally_frequent():
    """All 24 orders of four, 100 expected of each: a fair draw leaves [62, 138] once in some thousand tests."""
    drawn = Counter()
    for key in range(2400):
        permutation = Permutation(4, key)
        drawn[tuple(permutation(place) for place in range(4))] += 1
    assert len(drawn) == 24 and 62 <= min(drawn.values()) and max(drawn.values()) <= 138


def passes(mixture, places):
    """The samples of every source in the order of the places."""
    found = {}
    for place in places:
        source, turn = mixture.turn(place)
        found.setdefault(source, []).append(mixture.sample(source, turn))
    return found


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (3.0, 1.0, 0.5), (100.0, 1.0, 1.0)])
def test_every_stretch_holds_each_source_by_its_weight_and_each_source_passes_are_whole(weights):
    sizes = (40, 7, 23)
    mixture = Mixture(sizes, weights, seed=1, shuffle=True)
    shares = [weight / sum(weights) for weight in weights]
    for start in (0, 13, 10**12):
        dealt = Counter(mixture.turn(place)[0] for place in range(start, start + 1000))
        assert all(abs(dealt[source] - 1000 * share) <= 2 for source, share in enumerate(shares)), dealt
    first = 0
    for source, samples in sorted(passes(mixture, range(2000)).items()):
        size = sizes[source]
        whole = [samples[begin : begin + size] for begin in range(0, len(samples) - size + 1, size)]
        assert all(sorted(one) == list(range(first, first + size)) for one in whole)
        assert len(whole) < 2 or whole[0] != whole[1]
        first += size


def test_one_source_is_passed_through_again_and_again():
    mixture = Mixture((10,), (0.3,), seed=1, shuffle=False)
    assert [mixture.sample(*mixture.turn(place)) for place in range(25)] == [*range(10), *range(10), *range(5)]
    assert [mixture.sample(0, 8, shift) for shift in range(4)] == [8, 9, 0, 1]


def test_a_place_far_away_costs_no_more_than_the_first():
    """Twenty times more would still be constant; a table of 10^9 numbers takes seconds."""
    mixture = Mixture((10**9, 10**8), (2.0, 1.0), seed=1, shuffle=True)
    started = time.perf_counter()
    near = [mixture.sample(*mixture.turn(place)) for place in range(1000)]
    between = time.perf_counter()
    far = [mixture.sample(*mixture.turn(10**12 + place)) for place in range(1000)]
    assert time.perf_counter() - between < 20 * (between - started)
    assert len({*near, *far}) == 2000


@pytest.mark.parametrize("first_turns", [(), (5, 0, 1000)])
def test_samples_of_each_source_before_a_place_are_counted_without_walking(first_turns):
    mixture = Mixture((40, 7, 23), (3.0, 1.0, 0.5), seed=1, shuffle=True, first_turns=first_turns)
    counted = Counter(dict(enumerate(first_turns)))
    for place in range(20_000):  # longer than a period of the table
        if place % 1999 == 0:
            assert mixture.turns(place) == tuple(counted[source] for source in range(3))
        source, turn = mixture.turn(place)
        assert turn == counted[source]
        counted[source] += 1
    source, turn = mixture.turn(10**12)
    assert mixture.turns(10**12)[source] == turn


@pytest.mark.parametrize(
    ("sizes", "limit", "counts"),
    [
        ((10,), 4, [4]),
        ((10, 30), 8, [2, 6]),
        ((10, 30), None, [10, 30]),
        ((10, 30), 99, [10, 30]),
        ((1000, 1, 1), 10, [8, 1, 1]),
        ((1000, 1, 1), 3, [1, 1, 1]),
        ((5, 5, 5), 7, [3, 2, 2]),
    ],
)
def test_a_part_of_several_sets_takes_of_each_by_its_size(sizes, limit, counts):
    taken = list(take_of_each(sizes, limit))
    firsts = [sum(sizes[:number]) for number in range(len(sizes))]
    assert taken == [first + place for first, count in zip(firsts, counts, strict=True) for place in range(count)]

"""Packs, deals and balances are exactly those of the plain definitions below, which look at every pack or lane.

Exact: plans must be equal on all ranks and after an upgrade, so not even the order of additions may differ. Costs are
therefore floats that round, and many sizes and costs are equal, so that ties are frequent.
"""

import random

import pytest

from mimo_gemma4.data import planner
from mimo_gemma4.data.packing import balance, even_fit, first_fit


def plain_first_fit(order, sizes, capacity):
    packs, free = [], []
    for sample in order:
        pack = next((number for number, left in enumerate(free) if left >= sizes[sample]), None)
        if pack is None:
            packs.append([])
            free.append(capacity)
            pack = len(packs) - 1
        packs[pack].append(sample)
        free[pack] -= sizes[sample]
    return packs


def plain_even_fit(order, sizes, costs, capacity, count):
    packs = [[] for _ in range(count)]
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


def plain_balance(costs, load):
    chosen = [[] for _ in load]
    for entry in sorted(range(len(costs)), key=lambda entry: (-costs[entry], entry)):
        lane = min(range(len(load)), key=load.__getitem__)
        chosen[lane].append(entry)
        load[lane] += costs[entry]
    return [sorted(entries) for entries in chosen]


def plain_deal(sequences, parts):
    most = -(-len(sequences) // parts)
    dealt = [[] for _ in range(parts)]
    for sequence in sequences:
        open_parts = [part for part in dealt if len(part) < most]
        cheapest = min(open_parts, key=lambda part: (sum(member.cost for member in part), len(part)))
        cheapest.append(sequence)
    return dealt


def random_samples(generator):
    """Decreasing order, sizes and costs of up to 300 samples, and the capacity of a pack; some samples exceed it."""
    capacity = generator.choice([8, 60, 500])
    count = generator.choice([1, 2, 7, 40, 300])
    sizes = [generator.choice([1, capacity // 3, generator.randint(1, capacity)]) for _ in range(count)]
    if generator.random() < 0.2:
        sizes[0] = capacity + generator.randint(1, 5)
    per_token, per_pair = generator.choice([(1.0, 0.0), (0.1, 1 / 3), (0.0, 0.0)])
    costs = [per_token * size + per_pair * size * size for size in sizes]
    if generator.random() < 0.3:  # costs that do not follow from the sizes
        generator.shuffle(costs)
    return sorted(range(count), key=lambda sample: (-sizes[sample], sample)), sizes, costs, capacity


@pytest.mark.parametrize("seed", range(4))
def test_packs_are_those_of_the_definitions(seed):
    generator = random.Random(seed)
    some_fit = some_do_not = False
    for _ in range(60):
        order, sizes, costs, capacity = random_samples(generator)
        packs = first_fit(order, sizes, capacity)
        assert packs == plain_first_fit(order, sizes, capacity)
        for count in {len(packs), max(1, len(packs) - 1), min(len(packs) + generator.randint(0, 9), len(sizes))}:
            even = even_fit(order, sizes, costs, capacity, count)
            assert even == plain_even_fit(order, sizes, costs, capacity, count)
            some_fit, some_do_not = some_fit or even is not None, some_do_not or even is None
    assert some_fit and some_do_not


@pytest.mark.parametrize("seed", range(4))
def test_lanes_get_the_items_of_the_definitions(seed):
    generator = random.Random(seed)
    for _ in range(60):
        lanes = generator.choice([1, 2, 5, 32])
        fast, plain = [0.0] * lanes, [0.0] * lanes
        for _ in range(4):  # microbatches, whose loads add up
            costs = [generator.choice([0.0, 0.1, 0.7, generator.random()]) for _ in range(generator.choice([0, 3, 70]))]
            assert balance(costs, fast) == plain_balance(costs, plain)
            assert fast == plain


@pytest.mark.parametrize("seed", range(4))
def test_packs_are_dealt_as_the_definition_says(seed):
    generator = random.Random(seed)
    for _ in range(60):
        costs = [generator.choice([0.1, 0.7, generator.random()]) for _ in range(generator.choice([1, 6, 90]))]
        packs = [planner._Sequence((number,), 1, cost) for number, cost in enumerate(sorted(costs, reverse=True))]
        parts = generator.choice([1, 2, 5, 32])
        assert planner._deal(packs, parts) == plain_deal(packs, parts)

"""How long a step must take, whatever the order of its passes: a bound, and for small steps the truth by trying."""

from bisect import insort
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from heapq import heappop, heappush
from itertools import pairwise, product

from mimo_gemma4.data.manifest import PlannedMedia
from mimo_gemma4.distributed.layout import LANGUAGE
from mimo_gemma4.train.schedule import Action, pipeline_depth
from tests.schedule_simulator import Cost, World, passes_of

Pass = tuple[Action, int]
"""A pass and its rank."""
Order = tuple[tuple[Pass, ...], ...]
"""The passes of every rank, one after the other."""


def lower_bound(world: World, cost: Cost) -> float:
    """Seconds that no order can beat in which passes of a stage and kind follow their microbatches, in equal memory.

    A pass has a head, seconds that must go by before it, and a tail, seconds that must follow it. Both are at least as
    long as the longest way through passes that wait for one another, and as the time that the pass's own rank takes for
    those of its passes that come before (after) it, none of which starts before its own head. The bound is the longest
    time that a rank takes for all its passes between their heads and tails, if it might interrupt one for another:
    Jackson's preemptive schedule of one machine of a job shop.

    For layouts whose passes are of one rank each: no tensor or context parallel ranks, no shared experts.
    """
    before = precedence(world)
    seconds = {node: cost(*node) for node in before}
    after: dict[Pass, list[Pass]] = {node: [] for node in before}
    for node, others in before.items():
        for other in others:
            after[other].append(node)
    order = list(TopologicalSorter(before).static_order())
    heads, tails = _heads(order, before, seconds), _heads(order[::-1], after, seconds)
    ranks = {rank for _, rank in order}
    return max(_one_rank([node for node in order if node[1] == rank], heads, seconds, tails) for rank in ranks)


def precedence(world: World) -> dict[Pass, list[Pass]]:
    """Which passes each pass must wait for: for what they give, or for the memory that they free."""
    before = {}
    for name, grid in world.layout.grids.items():
        for rank in grid.ranks:
            before.update(_stage(world, name, rank))
    for item in world.manifest.media:
        for node, other in _edge(world, item):
            before[node].append(other)
    return before


def _stage(world: World, name: str, rank: int) -> Iterator[tuple[Pass, list[Pass]]]:
    """What the passes of a module's stage wait for within the module."""
    grid, stage = world.layout.grids[name], world.stage(name, rank)
    microbatches = [
        number
        for number in range(world.manifest.num_microbatches)
        if name == LANGUAGE or world.works(name, rank, number)
    ]
    forward, backward = ("decode", "") if name in world.layout.decoders else passes_of(name)
    room = pipeline_depth(world.layout) - stage
    if name != LANGUAGE:
        room += grid.pp - 2 + world.run_ahead.get(name, 0)

    def own(kind: str, place: int) -> list[Pass]:
        return [(Action(kind, microbatches[place], name), rank)] if place >= 0 else []  # type: ignore[arg-type]

    def neighbour(kind: str, place: int, step: int) -> list[Pass]:
        if not 0 <= stage + step < grid.pp or not world.works(name, rank, microbatches[place]):
            return []
        return [(Action(kind, microbatches[place], name), world.neighbour(name, rank, step))]  # type: ignore[arg-type]

    returns = backward != "" and world.returns(name, rank)
    for place in range(len(microbatches)):
        (node,) = own(forward, place)
        yield node, own(forward, place - 1) + neighbour(forward, place, -1) + own(backward, place - room) * returns
        if returns:
            (node,) = own(backward, place)
            yield node, own(forward, place) + own(backward, place - 1) + neighbour(backward, place, 1)


def _edge(world: World, item: PlannedMedia) -> Iterator[tuple[Pass, Pass]]:
    """Which passes of two modules wait for one another because of a media item."""
    name, number, layout = item.module, item.microbatch, world.layout
    here = layout.grids[name].rank_at(dp=item.module_lane, pp=layout.grids[name].pp - 1)
    there = layout.language.rank_at(dp=item.lane, pp=layout.language_stage(name))
    forward, backward = (Action("forward", number, LANGUAGE), there), (Action("backward", number, LANGUAGE), there)
    if name in layout.decoders:
        decode = Action("decode", number, name), here
        yield decode, forward
        if world.train and name in world.trained_from:
            yield backward, decode
    else:
        yield forward, (Action("encode", number, name), here)
        if world.returns(name, here):
            yield (Action("encoder_backward", number, name), here), backward


def _heads(order: list[Pass], before: dict[Pass, list[Pass]], seconds: dict[Pass, float]) -> dict[Pass, float]:
    """Seconds before each pass, in `order` of which everything comes after what it waits for."""
    heads: dict[Pass, float] = {}
    gone: dict[Pass, int] = {}  # all that a pass waits for, one bit each
    on_rank: dict[int, list[tuple[float, float, int]]] = {}
    for place, node in enumerate(order):
        waits_for = 0
        for other in before[node]:
            waits_for |= gone[other]
        free = 0.0
        mine = on_rank.setdefault(node[1], [])
        for head, length, bit in mine:  # by head
            if waits_for & bit:
                free = max(free, head) + length
        heads[node] = max([free, *(heads[other] + seconds[other] for other in before[node])])
        gone[node] = waits_for | 1 << place
        insort(mine, (heads[node], seconds[node], 1 << place))
    return heads


def _one_rank(
    nodes: list[Pass], heads: dict[Pass, float], seconds: dict[Pass, float], tails: dict[Pass, float]
) -> float:
    """Seconds until the last tail is over, if at any time the pass goes on that may and has the longest tail."""
    coming = sorted(nodes, key=heads.__getitem__, reverse=True)
    waiting: list[tuple[float, float]] = []  # tails, negative, and what is left of their passes
    now = end = 0.0
    while coming or waiting:
        if not waiting:
            now = max(now, heads[coming[-1]])
        while coming and heads[coming[-1]] <= now:
            node = coming.pop()
            heappush(waiting, (-tails[node], seconds[node]))
        tail, left = heappop(waiting)
        until = min(now + left, heads[coming[-1]]) if coming else now + left
        if until < now + left:
            heappush(waiting, (tail, left - (until - now)))
        else:
            end = max(end, until - tail)
        now = until
    return end


def orders(world: World) -> Iterator[Order]:
    """All orders in which ranks can do the passes of a step, and some in which they wait for one another for ever."""
    before = precedence(world)
    gone: dict[Pass, set[Pass]] = {}
    for node in TopologicalSorter(before).static_order():
        gone[node] = set(before[node]).union(*(gone[other] for other in before[node]))
    ranks = sorted({rank for _, rank in before})
    return product(*(list(_sorted([node for node in before if node[1] == rank], gone)) for rank in ranks))


def _sorted(nodes: list[Pass], gone: dict[Pass, set[Pass]]) -> Iterator[tuple[Pass, ...]]:
    """All ways to sort a rank's passes."""
    if not nodes:
        yield ()
    for node in nodes:
        if gone[node].isdisjoint(nodes):
            yield from ((node, *others) for others in _sorted([other for other in nodes if other != node], gone))


def duration(world: World, order: Order, cost: Cost) -> float:
    """Seconds of a step whose passes start as early as the order allows; infinite if they never do."""
    before = precedence(world)
    for passes in order:
        for one, other in pairwise(passes):
            before[other].append(one)
    ends: dict[Pass, float] = {}
    try:
        for node in TopologicalSorter(before).static_order():
            ends[node] = max((ends[other] for other in before[node]), default=0.0) + cost(*node)
    except CycleError:
        return float("inf")
    return max(ends.values())

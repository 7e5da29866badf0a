"""How long a step must take in any order of its passes."""

from graphlib import TopologicalSorter
from itertools import product

from mimo_gemma4.layout import LANGUAGE
from mimo_gemma4.schedule import Action
from tests.schedule_simulator import Cost, World


def lower_bound(world: World, cost: Cost) -> float:
    """Seconds that no order of passes can beat within the same memory, for one lane with a rank for each part.

    The larger of two bounds. The longest chain of passes each of which must wait for the one before: through encoder
    and stages and back, round after round, and for room, as stage s of P holds P - s microbatches. For every rank: the
    shortest way to any of its passes, all its work, and the shortest way from any of its passes to the end.
    """
    before = _precedence(world)
    seconds = {node: cost(Action(node[0], node[2], node[1]), node[3]) for node in before}
    order = list(TopologicalSorter(before).static_order())
    heads, tails = dict.fromkeys(order, 0.0), dict.fromkeys(order, 0.0)
    for node in order:
        heads[node] = max((heads[other] + seconds[other] for other in before[node]), default=0.0)
    for node in reversed(order):
        for other in before[node]:
            tails[other] = max(tails[other], tails[node] + seconds[node])
    bounds = [max(heads[node] + seconds[node] + tails[node] for node in order)]
    for rank in range(world.layout.world_size):
        mine = [node for node in order if node[3] == rank]
        work = sum(seconds[node] for node in mine)
        bounds.append(min(heads[node] for node in mine) + work + min(tails[node] for node in mine))
    return max(bounds)


Pass = tuple[str, str, int, int]
"""Kind, module, round and rank."""


def _precedence(world: World) -> dict[Pass, list[Pass]]:
    """Which passes each pass must wait for."""
    layout, rounds = world.layout, range(world.manifest.rounds)
    stages, before = layout.language.pp, {}

    def forward(stage: int, k: int) -> Pass:
        return ("forward", LANGUAGE, k, layout.language.rank_at(pp=stage))

    def backward(stage: int, k: int) -> Pass:
        return ("backward", LANGUAGE, k, layout.language.rank_at(pp=stage))

    for stage, k in product(range(stages), rounds):
        room = stages - stage
        before[forward(stage, k)] = [forward(stage - 1, k)] * (stage > 0) + [forward(stage, k - 1)] * (k > 0)
        before[forward(stage, k)] += [backward(stage, k - room)] * (k >= room)
        before[backward(stage, k)] = [backward(stage + 1, k) if stage < stages - 1 else forward(stage, k)]
        before[backward(stage, k)] += [backward(stage, k - 1)] * (k > 0)
    for name in layout.encoders:
        grid = layout.grids[name]
        for stage, k in product(range(grid.pp), rounds):
            this, back = (
                [(kind, name, k, grid.rank_at(pp=other)) for other in range(grid.pp)]
                for kind in ("encode", "encoder_backward")
            )
            rank, last = this[stage][3], stage == grid.pp - 1
            before[this[stage]] = [("encode", name, k - 1, rank)] * (k > 0) + this[max(0, stage - 1) : stage]
            if last:
                before[forward(0, k)].append(this[stage])
            if name in world.trained_from:
                room = stages - 1 + world.run_ahead[name] + grid.pp - 1 - stage
                before[back[stage]] = [backward(0, k) if last else back[stage + 1]]
                before[back[stage]] += [("encoder_backward", name, k - 1, rank)] * (k > 0)
                before[this[stage]] += [("encoder_backward", name, k - room, rank)] * (k >= room)
    return before

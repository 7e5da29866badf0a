"""Every group holds the ranks that its definition asks for, works from the first call, and meets no other group.

The oracle is the definition: two ranks of a module share a group when they agree on every coordinate outside it.
"""

from itertools import groupby

import pytest
import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from mimo_gemma4.config import LayoutConfig
from mimo_gemma4.distributed.layout import Layout, ModuleGrid, ModuleLayout, build_layout
from mimo_gemma4.distributed.platform import Platform
from mimo_gemma4.distributed.process_groups import create_process_groups, group_members
from tests.dist.harness import run_ranks

SPANS = {
    "tp": "tp",
    "cp": "cp",
    "pp": "pp",
    "tp_cp": "tp cp",
    "dp": "dp",
    "dp_cp": "dp cp",
    "dp_cp_gtp_remat": "dp cp",
    "intra_dp_cp": "dp cp",
    "mp": "tp pp",
    "tp_dp_cp": "tp dp cp",
    "intra_dist_opt": "tp cp dp pp",
    "embd": "pp",
    "pos_embd": "",
    # One expert-parallel lane: experts are whole on every rank, including tensor-parallel ones.
    "ep": "",
    "expt_tp": "",
    "tp_ep": "",
    "tp_ep_pp": "tp pp",
    "tp_ep_pp_with_egtp_remat": "tp pp",
    "expt_dp": "tp dp cp",
    "expt_dp_gtp_remat": "tp dp cp",
    "intra_expt_dp": "tp dp cp",
}
"""The dimensions that each group spans."""

LAYOUTS = {
    "three grids": LayoutConfig(
        {
            "vision": ModuleLayout(2, tp=2),
            "audio": ModuleLayout(2),
            "language": ModuleLayout(4, tp=2, cp=2, sequence_parallel=True),
        }
    ),
    "tp 2 cp 2 dp 2": LayoutConfig({"language": ModuleLayout(tp=2, cp=2)}),
    "uneven lists": LayoutConfig(
        {"vision": ModuleLayout([1, 4]), "language": ModuleLayout([0, 2, 3, 5, 6, 7], tp=2, cp=1)}
    ),
    "colocated": LayoutConfig(
        {"vision": ModuleLayout(tp=2), "audio": ModuleLayout(), "language": ModuleLayout(tp=2, cp=2)},
        placement="colocated",
    ),
    "stages": LayoutConfig(
        {
            "vision": ModuleLayout(4, tp=2, pp=2),
            "audio": ModuleLayout(2, pp=2),
            "language": ModuleLayout(2, pp=2),
        }
    ),
}


def expected_members(grid: ModuleGrid, rank: int, span: str) -> list[int]:
    fixed = [name for name in ("tp", "cp", "dp", "pp") if name not in span.split()]
    mine = grid.coordinate(rank)
    return [
        peer
        for peer in grid.ranks
        if all(getattr(grid.coordinate(peer), name) == getattr(mine, name) for name in fixed)
    ]


def check_collective(group: dist.ProcessGroup, members: list[int]) -> None:
    assert dist.get_process_group_ranks(group) == members
    total = torch.tensor([1.0 * 10 ** dist.get_rank()], dtype=torch.float64)
    dist.all_reduce(total, group=group)
    assert total.item() == sum(10**rank for rank in members)


def groups_of(collection: ProcessGroupCollection) -> dict[str, dist.ProcessGroup]:
    return {name: group for name, group in vars(collection).items() if group is not None}


def check(rank: int, config: LayoutConfig) -> None:
    layout = build_layout(config, dist.get_world_size())
    groups = create_process_groups(layout, Platform.detect())
    assert tuple(groups.modules) == layout.modules_of(rank)
    for name, collection in groups.modules.items():
        held = groups_of(collection)
        later = layout.grids[name].coordinate(rank).pp > 0
        assert set(held) == set(SPANS) - ({"pos_embd"} if later else set())
        for field, group in held.items():
            check_collective(group, expected_members(layout.grids[name], rank, SPANS[field]))
    check_bridges(layout, rank, groups.bridge_to_language, groups.bridge_to_module)
    check_collective(groups.host, list(range(layout.world_size)))
    check_sharing(rank, groups.modules)
    groups.destroy()
    check_collective(dist.group.WORLD, list(range(layout.world_size)))


def check_bridges(layout: Layout, rank: int, *directions: dict[str, dist.ProcessGroup | None]) -> None:
    assert all(tuple(direction) == layout.encoders for direction in directions)
    bridges = [direction[encoder] for encoder in layout.encoders for direction in directions]
    present = [bridge for bridge in bridges if bridge is not None]
    assert len(set(map(id, present))) == len(present), "each direction of each edge has a communicator of its own"
    for encoder in layout.encoders:
        last_stage = layout.grids[encoder].pp - 1
        members = sorted({*layout.grids[encoder].stage_ranks(last_stage), *layout.language.stage_ranks(0)})
        for direction in directions:
            assert (direction[encoder] is not None) == (rank in members)
            if rank in members:
                check_collective(direction[encoder], members)


def check_sharing(rank: int, modules: dict[str, ProcessGroupCollection]) -> None:
    """Modules share no group of several ranks; nor do tensor or context parallelism and gradient reduction."""
    owned = sorted(
        (id(group), name)
        for name, collection in modules.items()
        for group in groups_of(collection).values()
        if group.size() > 1
    )
    for _, users in groupby(owned, key=lambda pair: pair[0]):
        assert len({name for _, name in users}) == 1
    for collection in modules.values():
        for activations in (collection.tp, collection.cp):
            if activations.size() > 1:
                assert all(activations is not reduction for reduction in (collection.dp_cp, collection.dp))


@pytest.mark.parametrize("name", LAYOUTS)
def test_members_and_collectives(name: str) -> None:
    run_ranks(8, check, LAYOUTS[name])


@pytest.mark.parametrize("placement", ["colocated", "disjoint"])
def test_one_rank_holds_everything(placement: str) -> None:
    modules = {"language": ModuleLayout()}
    if placement == "colocated":
        modules = {"vision": ModuleLayout(), "audio": ModuleLayout()} | modules
    run_ranks(1, check_one_rank, LayoutConfig(modules, placement=placement))


def check_one_rank(rank: int, config: LayoutConfig) -> None:
    groups = create_process_groups(build_layout(config, 1), Platform.detect())
    assert set(groups.modules) == set(config.modules)
    for collection in groups.modules.values():
        assert all(group.size() == 1 for group in groups_of(collection).values())
    for bridge in (*groups.bridge_to_language.values(), *groups.bridge_to_module.values()):
        check_collective(bridge, [0])
    groups.destroy()


@pytest.mark.parametrize(("tp", "cp", "dp", "ep"), [(1, 1, 8, 4), (2, 1, 4, 2), (2, 2, 2, 4), (1, 2, 4, 8)])
def test_expert_groups_cut_lanes_and_never_tensor_parallel_ranks(
    tp: int, cp: int, dp: int, ep: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    grid = ModuleGrid("language", tuple(range(8)), tp, cp, dp, 1, ep, False)
    members = group_members(grid)

    def lane(rank: int) -> int:
        coordinate = grid.coordinate(rank)
        return coordinate.dp * cp + coordinate.cp

    for field, size, tp_ranks in (("ep", ep, 1), ("expt_dp", tp * cp * dp // ep, tp)):
        assert sorted(rank for group in members[field] for rank in group) == list(range(8)), field
        for group in members[field]:
            assert len(group) == size
            assert len({grid.coordinate(rank).tp for rank in group}) == tp_ranks
    for group in members["ep"]:
        assert len({lane(rank) // ep for rank in group}) == 1, "lanes of an expert parallel group are neighbours"
    for group in members["expt_dp"]:
        assert len({lane(rank) % ep for rank in group}) == 1, "replicas of an expert hold the same part"
    assert members["expt_tp"] == [(rank,) for rank in range(8)]
    assert all(len(group) == tp * ep for group in members["tp_ep_pp"])

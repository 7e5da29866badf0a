"""Torch process groups of a layout: all ranks create them in one global order and use each once before the first step.

`torch.distributed.new_group` is a collective of the whole world, so every rank goes through the same list of groups,
including those of modules that it does not hold. The warm-up makes NCCL set up its communicators at once, not inside a
training step, where ranks would wait for each other in different orders. Pairs of ranks are connected when they first
exchange something: few of the pairs between two large grids ever do.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.distributed as dist
from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed import ProcessGroup

from mimo_gemma4.distributed.layout import Layout, ModuleGrid
from mimo_gemma4.distributed.platform import Platform

Members = tuple[int, ...]
Traffic = Literal["activations", "gradients"]

TRAFFIC: dict[str, Traffic] = {
    "tp": "activations",
    "cp": "activations",
    "pp": "activations",
    "tp_cp": "activations",
    "ep": "activations",
    "expt_tp": "activations",
    "tp_ep": "activations",
    "dp": "gradients",
    "dp_cp": "gradients",
    "expt_dp": "gradients",
    "mp": "gradients",
    "tp_dp_cp": "gradients",
    "tp_ep_pp": "gradients",
    "intra_dist_opt": "gradients",
    "embd": "gradients",
    "pos_embd": "gradients",
}
"""The fields of `ProcessGroupCollection` that get a group, in the order of creation, and what travels on each.

Fields of one kind with equal members share one communicator: their collectives run in program order, which is the
same on all members. The two kinds never share one, because gradient reduction runs beside the collectives of the
backward pass and would queue behind them. Neither do modules, whose order of work differs between ranks. A group of one
rank has no peer to wait for and is shared by all.
"""

ALIASES = {
    "intra_dp_cp": "dp_cp",
    "intra_expt_dp": "expt_dp",
    "dp_cp_gtp_remat": "dp_cp",
    "expt_dp_gtp_remat": "expt_dp",
    "tp_ep_pp_with_egtp_remat": "tp_ep_pp",
}
"""Fields that equal another one because there is a single optimizer instance and weights are not rematerialised."""


@dataclass
class ProcessGroups:
    """The process groups of this rank."""

    host: ProcessGroup
    """gloo over all ranks, for communication on the host beside the device's work."""
    loading: dict[str, ProcessGroup] = field(default_factory=dict)
    """gloo over all ranks, one for each split of the data, used by the thread that loads it alone."""
    modules: dict[str, ProcessGroupCollection] = field(default_factory=dict)
    """Groups of the modules that this rank holds."""
    pipeline_backward: dict[str, ProcessGroup | None] = field(default_factory=dict)
    """By module of several stages, the group of this rank's pipeline for gradients; None on other ranks. Activations
    travel on the module's `pp`: two communicators, so that neither direction waits for the other."""
    bridge_to_language: dict[str, ProcessGroup | None] = field(default_factory=dict)
    """By encoder or decoder, the group of both ends of its edge (see `Layout.edge`), for what travels to the language
    module; None on other ranks."""
    bridge_to_module: dict[str, ProcessGroup | None] = field(default_factory=dict)
    """The same ranks, for what travels to the encoder or decoder: a second communicator, so that neither direction
    waits for the other."""
    created: list[ProcessGroup] = field(default_factory=list)
    """Every group of this rank, in the order of creation."""

    def destroy(self) -> None:
        """Destroy all groups, last created first. No group may be used afterwards."""
        while self.created:
            dist.destroy_process_group(self.created.pop())


def create_process_groups(layout: Layout, platform: Platform) -> ProcessGroups:
    """Create and warm up all groups of a layout; a collective over all ranks of the world.

    Args:
        layout: the grids of all modules.
        platform: gives the backend, the timeout and the device of the warm-up.
    """
    maker = _Maker(platform)
    everyone = tuple(range(layout.world_size))
    host = maker.new(everyone, "host", backend="gloo")
    assert host is not None
    alone = {rank: maker.new((rank,), "alone") for rank in everyone}
    groups = ProcessGroups(host=host)
    for split in ("train", "valid"):
        loading = maker.new(everyone, f"loading.{split}", backend="gloo")
        assert loading is not None
        groups.loading[split] = loading
    for name, grid in layout.grids.items():
        collection = _module_groups(grid, maker, alone)
        if maker.rank in grid:
            groups.modules[name] = collection
        if grid.pp > 1:
            pipelines = group_members(grid)["pp"]
            made = [maker.new(members, f"{name}.pp.backward") for members in pipelines]
            groups.pipeline_backward[name] = next((group for group in made if group is not None), None)
    for name in (*layout.encoders, *layout.decoders):
        senders, receivers = layout.edge(name)
        members = tuple(sorted({*senders, *receivers}))
        for end, bridge in (("to_language", groups.bridge_to_language), ("to_module", groups.bridge_to_module)):
            bridge[name] = alone[members[0]] if len(members) == 1 else maker.new(members, f"bridge.{name}.{end}")
    groups.created = maker.created
    return groups


def group_members(grid: ModuleGrid) -> dict[str, list[Members]]:
    """Global ranks of every group of a module, by field of `ProcessGroupCollection`; a pure function.

    Experts are cut over `ep` neighbours of dp*cp and never over tensor-parallel ranks: each tensor-parallel rank has
    its own expert-parallel groups, and `expt_tp` is a single rank. Tensor-parallel ranks route different tokens, so
    their experts are replicas like those of data-parallel ranks: `expt_dp` spans both.
    """
    # HyperCommGrid knows contiguous ranks only, so it enumerates positions in the grid's list.
    hyper = HyperCommGrid([grid.tp, grid.cp, grid.dp, grid.pp], ["tp", "cp", "dp", "pp"])
    expert_dp = grid.cp * grid.dp // grid.ep
    hyper.register_view("expert", [grid.tp, grid.ep, expert_dp, grid.pp], ["tp", "ep", "expt_dp", "pp"])

    def members(*dims: str, view: str | None = None) -> list[Members]:
        positions = hyper.get_rank_enum(list(dims), view=view)
        return [tuple(grid.ranks[position] for position in group) for group in positions]

    pipelines = members("pp")
    return {
        "tp": members("tp"),
        "cp": members("cp"),
        "pp": pipelines,
        "tp_cp": members("tp", "cp"),
        "ep": members("ep", view="expert"),
        "expt_tp": [(rank,) for rank in grid.ranks],
        "tp_ep": members("ep", view="expert"),
        "dp": members("dp"),
        "dp_cp": members("cp", "dp"),
        "expt_dp": members("tp", "expt_dp", view="expert"),
        "mp": members("tp", "pp"),
        "tp_dp_cp": members("tp", "cp", "dp"),
        "tp_ep_pp": members("tp", "ep", "pp", view="expert"),
        "intra_dist_opt": [grid.ranks],
        # First and last stage share the embedding table; the first alone has position embeddings.
        "embd": [tuple(dict.fromkeys((stages[0], stages[-1]))) for stages in pipelines],
        "pos_embd": [(stages[0],) for stages in pipelines],
    }


class _Maker:
    """Creates groups, uses each once, and keeps those of this rank."""

    def __init__(self, platform: Platform):
        self.rank = dist.get_rank()
        self.platform = platform
        self.created: list[ProcessGroup] = []

    def new(self, members: Members, description: str, backend: str | None = None) -> ProcessGroup | None:
        """A group that has been used once, or None on ranks outside it; every rank must make the same call."""
        backend = backend or self.platform.backend
        group = dist.new_group(list(members), timeout=self.platform.timeout, backend=backend, group_desc=description)
        if self.rank not in members:
            return None
        assert isinstance(group, ProcessGroup)
        self.created.append(group)
        device = torch.device("cpu") if backend == "gloo" else self.platform.device
        dist.all_reduce(torch.zeros(1, device=device), group=group)
        return group


def _module_groups(grid: ModuleGrid, maker: _Maker, alone: dict[int, ProcessGroup | None]) -> ProcessGroupCollection:
    """Groups of one module; on ranks outside the grid the collection is empty."""
    made: dict[tuple[Traffic, Members], ProcessGroup | None] = {}
    collection = ProcessGroupCollection()
    partitions = group_members(grid)
    for name, traffic in TRAFFIC.items():
        setattr(collection, name, None)
        for members in partitions[name]:
            key = traffic, members
            if len(members) == 1:
                made[key] = alone[members[0]]
            elif key not in made:
                made[key] = maker.new(members, f"{grid.name}.{name}")
            if maker.rank in members:
                setattr(collection, name, made[key])
    for name, source in ALIASES.items():
        setattr(collection, name, getattr(collection, source))
    return collection

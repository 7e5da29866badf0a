"""Which rank holds which module, at which coordinate of the module's grid: pure Python, testable without ranks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from mimo_gemma4.config import LayoutConfig, ModuleLayout
from mimo_gemma4.errors import LayoutError

LANGUAGE = "language"


class Coordinate(NamedTuple):
    """Position of a rank in a module's grid."""

    tp: int
    cp: int
    dp: int
    pp: int


@dataclass(frozen=True)
class ModuleGrid:
    """The ranks of one module: tp fastest, then cp, dp, pp, so `ranks[((p*dp + d)*cp + c)*tp + t]`."""

    name: str
    ranks: tuple[int, ...]
    """Global ranks, ascending."""
    tp: int
    cp: int
    dp: int
    pp: int
    ep: int
    sequence_parallel: bool
    reads: str | None = None
    """For a decoder, the encoder whose soft tokens it reads."""

    def coordinate(self, rank: int) -> Coordinate:
        """Coordinate of a global rank. Raises `ValueError` if the rank does not hold the module."""
        rest, tp = divmod(self.ranks.index(rank), self.tp)
        rest, cp = divmod(rest, self.cp)
        pp, dp = divmod(rest, self.dp)
        return Coordinate(tp, cp, dp, pp)

    def rank_at(self, *, tp: int = 0, cp: int = 0, dp: int = 0, pp: int = 0) -> int:
        """Global rank at a coordinate."""
        return self.ranks[((pp * self.dp + dp) * self.cp + cp) * self.tp + tp]

    def stage_ranks(self, pp: int) -> tuple[int, ...]:
        """Global ranks of a pipeline stage, ascending."""
        size = len(self.ranks) // self.pp
        return self.ranks[pp * size : (pp + 1) * size]

    def __contains__(self, rank: int) -> bool:
        """Whether a global rank holds the module."""
        return rank in self.ranks


@dataclass(frozen=True)
class Layout:
    """The grids of all modules, in the order in which the configuration writes them."""

    grids: dict[str, ModuleGrid]
    world_size: int
    placement: str
    """`disjoint`, `colocated` or `mixed`."""

    @property
    def language(self) -> ModuleGrid:
        """Grid of the language model."""
        return self.grids[LANGUAGE]

    @property
    def encoders(self) -> tuple[str, ...]:
        """Names of the encoders, whose soft tokens the language model reads."""
        return tuple(name for name, grid in self.grids.items() if name != LANGUAGE and grid.reads is None)

    @property
    def decoders(self) -> tuple[str, ...]:
        """Names of the decoders, which read hidden states of the language model."""
        return tuple(name for name, grid in self.grids.items() if grid.reads is not None)

    def language_stage(self, name: str) -> int:
        """The language stage at the edge of module `name`: the first for an encoder, the last for a decoder."""
        return self.language.pp - 1 if self.grids[name].reads is not None else 0

    def edge(self, name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Global ranks at both ends of an edge: of the encoder or decoder `name`, and of the language module."""
        grid = self.grids[name]
        return grid.stage_ranks(grid.pp - 1), self.language.stage_ranks(self.language_stage(name))

    def modules_of(self, rank: int) -> tuple[str, ...]:
        """Names of the modules that a global rank holds."""
        return tuple(name for name, grid in self.grids.items() if rank in grid)


def build_layout(
    config: LayoutConfig | Mapping[str, ModuleLayout], world_size: int, ranks_per_host: Sequence[int] | None = None
) -> Layout:
    """Place every module on its ranks.

    Args:
        config: the `layout` section, or its modules alone, with everything else at its default.
        world_size: number of ranks that were started.
        ranks_per_host: number of ranks on each host in rank order; None: all on one host.

    Raises `LayoutError`, which names the numbers that disagree and the key to change.
    """
    if not isinstance(config, LayoutConfig):
        config = LayoutConfig(modules=dict(config))
    modules = config.modules
    if LANGUAGE not in modules:
        written = ", ".join(modules) or "no module"
        raise LayoutError(f"`layout` names {written} but not `{LANGUAGE}`: add `layout.{LANGUAGE}` with its ranks")
    for name, module in modules.items():
        _check_sizes(name, module)
        _check_reads(name, modules)
    if config.placement == "colocated" or len(modules) == 1:
        placed = _colocated(modules, world_size)
    else:
        placed = _listed(modules, world_size, shared=config.placement == "mixed")
    grids = {name: _grid(name, modules[name], ranks) for name, ranks in placed.items()}
    if ranks_per_host is not None and not config.allow_tp_across_hosts:
        for grid in grids.values():
            _check_hosts(grid, ranks_per_host)
    return Layout(grids, world_size, config.placement)


def _check_sizes(name: str, module: ModuleLayout) -> None:
    kind = "an encoder" if module.reads is None else "a decoder"
    if name != LANGUAGE and module.cp > 1:
        raise LayoutError(
            f"`layout.{name}.cp` is {module.cp}: {kind}'s items are not cut along a sequence, set it to 1 (its "
            "ranks then share the items)"
        )
    for key in ("sequence_parallel", "part_shared_key_values"):
        if name != LANGUAGE and getattr(module, key):
            raise LayoutError(f"`layout.{name}.{key}` is true: only the language model has it, leave it out")
    if module.reads is not None and module.pp > 1:
        raise LayoutError(
            f"`layout.{name}.pp` is {module.pp}: a decoder in pipeline stages is not available yet, set it to 1 "
            f"and raise `layout.{name}.tp` if the module does not fit"
        )
    if name != LANGUAGE and module.ep > 1:
        raise LayoutError(f"`layout.{name}.ep` is {module.ep}: {kind} has no experts, set it to 1")


def _check_reads(name: str, modules: Mapping[str, ModuleLayout]) -> None:
    reads = modules[name].reads
    if reads is None:
        return
    if name == LANGUAGE:
        raise LayoutError(f"`layout.{LANGUAGE}.reads` is {reads}: only a decoder reads the language model's tokens")
    known = [other for other, module in modules.items() if other != LANGUAGE and module.reads is None]
    if reads not in known:
        raise LayoutError(
            f"`layout.{name}.reads` is {reads}: it must name an encoder of the layout, whose soft tokens are read; "
            f"encoders here: {', '.join(known) or 'none'}"
        )


def _listed(modules: Mapping[str, ModuleLayout], world_size: int, shared: bool) -> dict[str, tuple[int, ...]]:
    """Ranks of each module: those of its list, or as many as its count of the ranks in no list, in order.

    With `shared`, lists may have ranks in common.
    """
    sizes: dict[str, int] = {}
    owner: dict[int, str] = {}
    common = 0
    for name, module in modules.items():
        if module.ranks is None:
            raise LayoutError(
                f"`layout.{name}.ranks` is missing: every module needs a count or a list of ranks, or write "
                "`layout.placement: colocated` to put every module on all ranks"
            )
        sizes[name] = _size(name, module.ranks)
        if not isinstance(module.ranks, int):
            for rank in module.ranks:
                if rank in owner and not shared:
                    raise LayoutError(
                        f"rank {rank} is in both `layout.{owner[rank]}.ranks` and `layout.{name}.ranks`: take it out "
                        "of one, write `layout.placement: mixed` to let modules share the ranks of their lists, or "
                        "`layout.placement: colocated` to put every module on all ranks"
                    )
                common += rank in owner
                owner[rank] = name
    _check_world(sizes, world_size, common)
    _check_in_world(owner, world_size)
    free = [rank for rank in range(world_size) if rank not in owner]
    placed: dict[str, tuple[int, ...]] = {}
    for name, module in modules.items():
        if isinstance(module.ranks, int):
            placed[name], free = tuple(free[: sizes[name]]), free[sizes[name] :]
        else:
            placed[name] = tuple(module.ranks or ())
    return placed


def _colocated(modules: Mapping[str, ModuleLayout], world_size: int) -> dict[str, tuple[int, ...]]:
    """Every module on all ranks."""
    everyone = tuple(range(world_size))
    for name, module in modules.items():
        if module.ranks is None:
            continue
        size = _size(name, module.ranks)
        if len(modules) > 1 and size != world_size:
            raise LayoutError(
                f"`layout.{name}.ranks` asks for {size} ranks and {world_size} were started, but with "
                f"`layout.placement` colocated every module is on all ranks: leave `layout.{name}.ranks` out, or start "
                f"{size} ranks: {launch_line(size)}"
            )
        _check_world({name: size}, world_size)
        if not isinstance(module.ranks, int):
            _check_in_world(dict.fromkeys(module.ranks, name), world_size)
    return dict.fromkeys(modules, everyone)


def _size(name: str, ranks: int | Sequence[int]) -> int:
    if isinstance(ranks, int):
        if ranks < 1:
            raise LayoutError(f"`layout.{name}.ranks` is {ranks}: a module needs at least 1 rank")
        return ranks
    if not ranks:
        raise LayoutError(f"`layout.{name}.ranks` is an empty list: a module needs at least 1 rank")
    if list(ranks) != sorted(set(ranks)):
        raise LayoutError(
            f"`layout.{name}.ranks` is {list(ranks)}: list each rank once, in ascending order: {sorted(set(ranks))}"
        )
    return len(ranks)


def _check_world(sizes: Mapping[str, int], world_size: int, common: int = 0) -> None:
    """Raise unless modules of these sizes fill the world; `common` of their ranks are counted again."""
    total = sum(sizes.values()) - common
    if total == world_size:
        return
    terms = " + ".join(f"{name} {size}" for name, size in sizes.items()) + (f" - {common} shared" if common else "")
    spare = world_size - total
    difference = f"{spare} would hold no module" if spare > 0 else f"{-spare} more would be needed"
    keys = ", ".join(f"`layout.{name}.ranks`" for name in sizes)
    raise LayoutError(
        f"`layout` asks for {total} ranks ({terms}) but {world_size} were started: {difference}. Change {keys}, "
        f"or start {total} ranks: {launch_line(total)}"
    )


def _check_in_world(owner: Mapping[int, str], world_size: int) -> None:
    for rank, name in owner.items():
        if not 0 <= rank < world_size:
            raise LayoutError(
                f"`layout.{name}.ranks` names rank {rank}, but {world_size} ranks were started: 0 to {world_size - 1}"
            )


def launch_line(world_size: int) -> str:
    """The command that starts `world_size` ranks on one machine."""
    return f"torchrun --nproc-per-node {world_size} train_mimo.py config=…"


def _grid(name: str, module: ModuleLayout, ranks: tuple[int, ...]) -> ModuleGrid:
    model_parallel = module.tp * module.cp * module.pp
    if len(ranks) % model_parallel:
        lower = len(ranks) - len(ranks) % model_parallel
        sizes = f"{lower} or {lower + model_parallel}" if lower else f"{model_parallel}"
        raise LayoutError(
            f"`layout.{name}` has {len(ranks)} ranks, which tp {module.tp} * cp {module.cp} * pp {module.pp} = "
            f"{model_parallel} does not divide: set `layout.{name}.ranks` to {sizes}, or change `layout.{name}.tp`, "
            f"`layout.{name}.cp` or `layout.{name}.pp`"
        )
    dp = len(ranks) // model_parallel
    if dp * module.cp % module.ep:
        raise LayoutError(
            f"`layout.{name}.ep` is {module.ep}, which does not divide dp {dp} * cp {module.cp} = {dp * module.cp}: "
            "experts are cut over data- and context-parallel ranks; change "
            f"`layout.{name}.ep` or `layout.{name}.ranks`"
        )
    return ModuleGrid(
        name, ranks, module.tp, module.cp, dp, module.pp, module.ep, module.sequence_parallel, module.reads
    )


def _check_hosts(grid: ModuleGrid, ranks_per_host: Sequence[int]) -> None:
    """Raise where a tensor-parallel group of the grid has ranks on several hosts."""
    host_of = [host for host, count in enumerate(ranks_per_host) for _ in range(count)]
    for start in range(0, len(grid.ranks), grid.tp):
        group = grid.ranks[start : start + grid.tp]
        hosts = sorted({host_of[rank] for rank in group})
        if len(hosts) > 1:
            where = ", ".join(f"host {host} has ranks {_spans(_ranks_of(host, host_of))}" for host in hosts)
            raise LayoutError(
                f"the tensor-parallel ranks {_spans(group)} of `layout.{grid.name}` are on several hosts ({where}): "
                f"lower `layout.{grid.name}.tp` from {grid.tp}, choose other ranks with a list in "
                f"`layout.{grid.name}.ranks`, or accept slow tensor parallelism with "
                "`layout.allow_tp_across_hosts: true`"
            )


def _ranks_of(host: int, host_of: Sequence[int]) -> list[int]:
    return [rank for rank, its_host in enumerate(host_of) if its_host == host]


def layout_table(layout: Layout) -> str:
    """The layout as text: a line per module with its sizes, then a line per rank with its coordinate in each module."""
    header = ("module", "ranks", "tp", "cp", "dp", "pp", "ep", "sequence parallel")
    modules = [
        (
            *(grid.name, _spans(grid.ranks)),
            *map(str, (grid.tp, grid.cp, grid.dp, grid.pp, grid.ep)),
            "yes" if grid.sequence_parallel and grid.tp > 1 else "no",
        )
        for grid in layout.grids.values()
    ]
    names = tuple(layout.grids)
    cells = [(str(rank), *(_cell(layout.grids[name], rank) for name in names)) for rank in range(layout.world_size)]
    summary = f"{layout.world_size} ranks, {layout.placement}"
    return "\n".join([summary, "", *_columns([header, *modules]), "", *_columns([("rank", *names), *cells])])


def _cell(grid: ModuleGrid, rank: int) -> str:
    if rank not in grid:
        return "-"
    coordinate = grid.coordinate(rank)
    stage = f" pp{coordinate.pp}" if grid.pp > 1 else ""
    return f"tp{coordinate.tp} cp{coordinate.cp} dp{coordinate.dp}{stage}"


def _spans(ranks: Sequence[int]) -> str:
    """Ascending ranks as spans: `0-3,6`."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)


def _columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]

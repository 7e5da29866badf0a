"""Modules land on the ranks and coordinates that the `layout` section asks for."""

import subprocess
import sys
from itertools import product

import pytest

from mimo_gemma4.config import LayoutConfig
from mimo_gemma4.distributed.layout import ModuleLayout, build_layout, layout_table


@pytest.mark.parametrize(
    ("modules", "world_size", "placement", "expected"),
    [
        (
            {"vision": ModuleLayout(2), "audio": ModuleLayout(1), "language": ModuleLayout(4, tp=2)},
            7,
            "disjoint",
            {"vision": (0, 1), "audio": (2,), "language": (3, 4, 5, 6)},
        ),
        (
            {"language": ModuleLayout(4, tp=2), "vision": ModuleLayout(2)},
            6,
            "disjoint",
            {"language": (0, 1, 2, 3), "vision": (4, 5)},
        ),
        (
            {"vision": ModuleLayout([1, 4]), "language": ModuleLayout([0, 2, 3, 5])},
            6,
            "disjoint",
            {"vision": (1, 4), "language": (0, 2, 3, 5)},
        ),
        (  # counts take what lists leave
            {"vision": ModuleLayout(2), "audio": ModuleLayout([0]), "language": ModuleLayout(3)},
            6,
            "disjoint",
            {"vision": (1, 2), "audio": (0,), "language": (3, 4, 5)},
        ),
        ({"language": ModuleLayout()}, 3, "disjoint", {"language": (0, 1, 2)}),
        (
            {"vision": ModuleLayout(), "language": ModuleLayout(4, tp=4)},
            4,
            "colocated",
            {"vision": (0, 1, 2, 3), "language": (0, 1, 2, 3)},
        ),
        (
            {"vision": ModuleLayout([0, 1]), "language": ModuleLayout(tp=2)},
            2,
            "colocated",
            {"vision": (0, 1), "language": (0, 1)},
        ),
        (
            {"vision": ModuleLayout([0, 1, 2, 3]), "audio": ModuleLayout(2), "language": ModuleLayout([0, 1, 2, 3])},
            6,
            "mixed",
            {"vision": (0, 1, 2, 3), "audio": (4, 5), "language": (0, 1, 2, 3)},
        ),
        (
            {"vision": ModuleLayout([0, 1]), "audio": ModuleLayout([1]), "language": ModuleLayout([2, 3, 4, 5])},
            6,
            "mixed",
            {"vision": (0, 1), "audio": (1,), "language": (2, 3, 4, 5)},
        ),
        (
            {"vision": ModuleLayout(1), "audio": ModuleLayout(), "language": ModuleLayout(sequence_parallel=True)},
            1,
            "colocated",
            {"vision": (0,), "audio": (0,), "language": (0,)},
        ),
    ],
)
def test_ranks(modules: dict, world_size: int, placement: str, expected: dict) -> None:
    layout = build_layout(LayoutConfig(modules, placement=placement), world_size)
    assert {name: grid.ranks for name, grid in layout.grids.items()} == expected
    assert list(layout.grids) == list(modules)
    assert layout.encoders == tuple(name for name in modules if name != "language")
    for rank in range(world_size):
        assert layout.modules_of(rank) == tuple(name for name, ranks in expected.items() if rank in ranks)


@pytest.mark.parametrize("pp", [1, 3])
def test_decoders_are_told_from_encoders_and_read_the_last_stage(pp: int) -> None:
    modules = {
        "pixels": ModuleLayout(2, reads="vision"),
        "language": ModuleLayout(pp, pp=pp),
        "vision": ModuleLayout(1),
    }
    layout = build_layout(modules, 3 + pp)
    assert (layout.encoders, layout.decoders) == (("vision",), ("pixels",))
    assert layout.grids["pixels"].dp == 2
    assert (layout.language_stage("vision"), layout.language_stage("pixels")) == (0, pp - 1)


def test_coordinates_run_tensor_parallel_first() -> None:
    ranks = [1, 2, 3, 5, 6, 7, 8, 9, 11, 12, 13, 14]
    layout = build_layout({"vision": ModuleLayout([0, 4, 10]), "language": ModuleLayout(ranks, tp=2, cp=3)}, 15)
    grid = layout.language
    assert (grid.tp, grid.cp, grid.dp, grid.pp) == (2, 3, 2, 1)
    for index, (dp, cp, tp) in enumerate(product(range(2), range(3), range(2))):
        assert grid.coordinate(ranks[index]) == (tp, cp, dp, 0)
        assert grid.rank_at(tp=tp, cp=cp, dp=dp) == ranks[index]
    assert 4 not in grid and 5 in grid
    with pytest.raises(ValueError):
        grid.coordinate(4)


@pytest.mark.parametrize(
    ("hosts", "vision", "tp"),
    [(None, 2, 6), ([8], 2, 6), ([4, 4], 4, 4), ([4, 4], 2, 2), ([3, 5], 3, 5), ([3, 5], 1, 1), ([2, 1, 5], 3, 5)],
)
def test_tensor_parallel_groups_that_stay_on_one_host(hosts: list[int] | None, vision: int, tp: int) -> None:
    build_layout({"vision": ModuleLayout(vision), "language": ModuleLayout(8 - vision, tp=tp)}, 8, hosts)


def test_table_shows_every_rank() -> None:
    layout = build_layout(
        {"vision": ModuleLayout([0, 3]), "language": ModuleLayout([1, 2, 4, 5], tp=2, sequence_parallel=True)}, 6
    )
    assert layout_table(layout).splitlines() == [
        "6 ranks, disjoint",
        "",
        "module    ranks    tp  cp  dp  pp  ep  sequence parallel",
        "vision    0,3      1   1   2   1   1   no",
        "language  1-2,4-5  2   1   2   1   1   yes",
        "",
        "rank  vision       language",
        "0     tp0 cp0 dp0  -",
        "1     -            tp0 cp0 dp0",
        "2     -            tp1 cp0 dp0",
        "3     tp0 cp0 dp1  -",
        "4     -            tp0 cp0 dp1",
        "5     -            tp1 cp0 dp1",
    ]


def test_layout_needs_no_torch() -> None:
    code = "import sys, mimo_gemma4.distributed.layout; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

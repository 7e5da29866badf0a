"""Every training configuration that ships is valid and places its modules on the ranks it asks for."""

import re
from pathlib import Path

import pytest

from mimo_gemma4.config import load_config
from mimo_gemma4.distributed.layout import build_layout
from tests import REPOSITORY

CONFIGS = sorted((REPOSITORY / "configs").glob("*.yaml"))
SCRIPTS = sorted((REPOSITORY / "configs" / "slurm").glob("*.sbatch"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configuration_is_a_layout(path: Path) -> None:
    config = load_config([f"config={path}"])
    modules = config.layout.modules
    if config.layout.placement == "colocated":
        world = modules["language"].ranks or 8
    else:
        world = sum(len(m.ranks) if isinstance(m.ranks, list) else m.ranks or 0 for m in modules.values())
    assert isinstance(world, int)
    layout = build_layout(config.layout, world, [8] * (world // 8) or None)
    assert sorted(rank for rank in range(world) if layout.modules_of(rank)) == list(range(world))
    assert config.data.seq_length % (2 * layout.language.cp * layout.language.tp) == 0


@pytest.mark.parametrize(
    "path", sorted((REPOSITORY / "configs" / "slurm").glob("*.sbatch")), ids=lambda path: path.stem
)
def test_a_slurm_script_asks_for_the_ranks_of_its_configuration(path: Path) -> None:
    script = path.read_text(encoding="utf-8")
    nodes, gpus, started = (
        int(re.search(pattern, script)[1])  # type: ignore[index]
        for pattern in (r"--nodes=(\d+)", r"--gpus-per-node=(\d+)", r"--nproc-per-node (\d+)")
    )
    config = load_config([f"config={re.search(r'config=(\S+)', script)[1]}"])  # type: ignore[index]
    layout = build_layout(config.layout, nodes * gpus, [gpus] * nodes)
    assert gpus == started
    assert layout.world_size == len(layout.language.ranks)

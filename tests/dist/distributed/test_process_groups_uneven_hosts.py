"""Two torchruns of 3 and 5 ranks make one world: hosts are distinguished, and all groups of a layout work."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests import REPOSITORY

SCRIPT = """
import torch
import torch.distributed as dist

from mimo_gemma4.distributed.layout import ModuleLayout, build_layout
from mimo_gemma4.distributed.platform import create_platform, destroy_distributed, ranks_per_host
from mimo_gemma4.distributed.process_groups import create_process_groups

platform = create_platform()
hosts = ranks_per_host()
modules = {"audio": ModuleLayout(1), "vision": ModuleLayout(2, tp=2), "language": ModuleLayout(5, cp=5)}
layout = build_layout(modules, dist.get_world_size(), hosts)
groups = create_process_groups(layout, platform)
sums = []
members = [groups.host, *groups.bridge_to_language.values(), *(held.intra_dist_opt for held in groups.modules.values())]
for group in members:
    if group is not None:
        total = torch.tensor([2 ** platform.rank])
        dist.all_reduce(total, group=group)
        sums.append(int(total))
print(f"rank {platform.rank} hosts {hosts} sums {sums}", flush=True)
groups.destroy()
destroy_distributed()
"""


@pytest.mark.slow
def test_two_torchruns_of_uneven_size(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    launches = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(node)),
                *(
                    "--nproc-per-node",
                    str(count),
                    "--master-addr",
                    "127.0.0.1",
                    "--master-port",
                    str(port),
                    str(script),
                ),
            ],
            env=os.environ | shared,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node, count in enumerate((3, 5))
    ]
    output = "".join(launch.communicate(timeout=240)[0] for launch in launches)
    assert [launch.returncode for launch in launches] == [0, 0], output
    everyone, audio, vision, language = 255, 1, 2 + 4, 8 + 16 + 32 + 64 + 128
    for rank in range(8):
        if rank == 0:
            sums = [everyone, audio + language, audio]
        elif rank < 3:
            sums = [everyone, vision + language, vision]
        else:
            sums = [everyone, audio + language, vision + language, language]
        assert f"rank {rank} hosts [3, 5] sums {sums}" in output

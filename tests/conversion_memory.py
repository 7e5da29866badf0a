"""Prints by how many bytes memory grows in a conversion to a checkpoint, and in one back, as a JSON list.

Run with:  python -m tests.conversion_memory SMALL LARGE FOLDER SHARD_BYTES

A process of its own: what an allocator has kept of earlier work would hide or add growth. The directory SMALL is
converted first, so that all code and libraries that a conversion needs are there when LARGE is measured.
"""

import json
import sys
from pathlib import Path

from mimo_gemma4.convert.__main__ import main


def resident(field: str) -> int:
    """Bytes of memory that this process has now (`VmRSS`) or had at most (`VmHWM`), mapped files included."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def growth(source: Path, folder: Path, shard_bytes: str) -> list[int]:
    """Peak growth of each direction."""
    folder.mkdir()
    found = []
    for arguments in (["from-hf", source, folder / "checkpoint"], ["to-hf", folder / "checkpoint", folder / "back"]):
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak is that from here on
        assert main([*map(str, arguments), "--max-shard-size", shard_bytes]) == 0
        found.append(resident("VmHWM") - before)
    return found


if __name__ == "__main__":
    small, large, folder = (Path(argument) for argument in sys.argv[1:4])
    growth(small, folder / "small", sys.argv[4])
    print(json.dumps(growth(large, folder / "large", sys.argv[4])))

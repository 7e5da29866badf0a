"""Reads checkpoints with nothing of the project's own code."""

import json
from pathlib import Path

import torch
from safetensors import safe_open


def whole_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint put together by the tests' own reading; every element must be written once."""
    whole: dict[str, torch.Tensor] = {}
    written: dict[str, torch.Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, framework="pt") as handle:
            shapes = json.loads(handle.metadata()["shapes"])
            for entry in handle.keys():
                key, at, offsets = entry.rpartition("@")
                if not at:
                    continue
                value = handle.get_tensor(entry)
                starts = [int(offset) for offset in offsets.split(",") if offset]
                place = tuple(slice(start, start + n) for start, n in zip(starts, value.shape, strict=True))
                whole.setdefault(key, torch.empty(shapes[key], dtype=value.dtype))[place] = value
                written.setdefault(key, torch.zeros(shapes[key], dtype=torch.int32))[place] += 1
    assert all((count == 1).all() for count in written.values())
    return whole

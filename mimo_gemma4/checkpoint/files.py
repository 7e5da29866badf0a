"""Checkpoint folders: finding complete ones, checking them, and reading boxes of Hugging Face tensors.

Tensors are named `<module>.<kind>.<Hugging Face name>@<offsets>` (see `save_load.py`). A checkpoint that was converted
from a Hugging Face directory has weights alone, which belong to no module yet: `weight.<Hugging Face name>@<offsets>`.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from mimo_gemma4.checkpoint.boxes import Box, intersect, size, translate
from mimo_gemma4.errors import CheckpointError
from mimo_gemma4.weights.safetensors_rows import DTYPES, TensorEntry, TensorFile

MARKER = "complete.json"
_KEY = re.compile(r"(?:[^.]+\.)??(?P<kind>weight|main_weight|exp_avg|exp_avg_sq)\.(?P<name>.+)")


def entry_name(key: str, offsets: Iterable[int]) -> str:
    """Name under which the box of `key` that starts at `offsets` is stored."""
    return f"{key}@{','.join(str(offset) for offset in offsets)}"


def read_marker(path: Path) -> dict[str, Any] | str:
    """The marker of a complete checkpoint, or a text that says why the folder is none."""
    try:
        marker: dict[str, Any] = json.loads((path / MARKER).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"it has no {MARKER}, so its writing was never finished" if path.is_dir() else "there is no such folder"
    except (OSError, ValueError) as error:
        return f"its {MARKER} is damaged ({error})"
    for name, entry in marker["files"].items():
        file = path / name
        found = file.stat().st_size if file.is_file() else None
        if found != entry["bytes"]:
            state = "is missing" if found is None else f"has {found} bytes"
            return f"{name} {state} where {MARKER} lists {entry['bytes']} bytes"
    return marker


def complete(folder: Path) -> list[Path]:
    """Complete checkpoints in the order in which they were written."""
    found = [path for path in folder.glob("step_*") if re.fullmatch(r"step_\d+", path.name)]
    return sorted((path for path in found if not isinstance(read_marker(path), str)), key=serial)


def serial(path: Path) -> int:
    """Position of a complete checkpoint in the order of writing, from 1."""
    return int(json.loads((path / MARKER).read_text(encoding="utf-8"))["serial"])


def latest(folder: Path) -> Path | None:
    """The complete checkpoint in `folder` that was written last, or None."""
    found = complete(folder)
    return found[-1] if found else None


def locate(path: Path) -> Path:
    """The checkpoint `path`, or the newest complete one of the run directory `path`. Raises `CheckpointError`."""
    marker = read_marker(path)
    if not isinstance(marker, str):
        return path
    found = latest(path / "checkpoints")
    if found is None:
        raise CheckpointError(
            f"{path} is no checkpoint ({marker}), and no run directory either: {path / 'checkpoints'} holds no "
            "complete checkpoint"
        )
    return found


def verify(path: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise `CheckpointError` where the sha256 of a file is not the one in the marker."""
    with ThreadPoolExecutor() as pool:
        found = dict(zip(files, pool.map(lambda name: digest(path / name), files), strict=True))
    for name, entry in files.items():
        if found[name] != entry["sha256"]:
            raise CheckpointError(
                f"{path / name} was changed after it was written (its sha256 is not the one in {MARKER}); delete "
                f"{path} to go on from an earlier checkpoint"
            )


def digest(path: Path) -> str:
    """sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class StoredBox:
    """A box of a tensor in a file."""

    box: Box
    entry: str
    """Its name in the file."""
    file: TensorFile


class CheckpointFiles:
    """The boxes that a checkpoint's files hold, by key (the part of the stored name before `@`)."""

    def __init__(self, path: Path, files: Iterable[str]):
        """Read the headers of `files`. Raises `CheckpointError`."""
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.boxes: dict[str, list[StoredBox]] = {}
        self._handles: dict[Path, Any] = {}
        for name in files:
            file = TensorFile(path / name)
            self.shapes |= {key: tuple(shape) for key, shape in json.loads(file.metadata["shapes"]).items()}
            for entry, stored in file.entries.items():
                key, _, offsets = entry.rpartition("@")
                if key not in self.shapes:
                    continue
                starts = [int(offset) for offset in offsets.split(",") if offset]
                box = tuple(slice(start, start + length) for start, length in zip(starts, stored.shape, strict=True))
                self.boxes.setdefault(key, []).append(StoredBox(box, entry, file))

    def keys(self, kind: str) -> dict[str, str]:
        """Keys of a kind by Hugging Face name."""
        matches = {key: _KEY.fullmatch(key) for key in self.shapes}
        return {match["name"]: key for key, match in matches.items() if match and match["kind"] == kind}

    def entry(self, key: str) -> TensorEntry:
        """Element type and shape of the whole tensor `key`."""
        stored = self.boxes[key][0]
        return TensorEntry(stored.file.entries[stored.entry].dtype, self.shapes[key])

    def lacking(self, key: str, box: Box) -> int:
        """Number of elements of `box` that no file holds."""
        return size(box) - sum(size(common) for common, _ in self._overlaps(key, box))

    def read(self, key: str, box: Box, target: Tensor) -> None:
        """Copy `box` of the tensor into `target`, which has the box's sizes; reads nothing else."""
        for common, stored in self._overlaps(key, box):
            handle = self._handle(stored.file.path).get_slice(stored.entry)
            value = handle[translate(common, stored.box)] if common else handle[...]
            target[translate(common, box)].copy_(value)

    def rows(self, key: str, start: int, stop: int) -> Tensor:
        """Rows `[start, stop)` of the whole tensor, put together from its boxes without mapping a file."""
        entry, first_box = self.entry(key), self.boxes[key][0]
        if first_box.file.entries[first_box.entry] == entry:  # it is the whole tensor
            return first_box.file.read(first_box.entry, start, stop)
        result = torch.empty((stop - start, *entry.shape[1:]), dtype=DTYPES[entry.dtype])
        shape = entry.shape or (1,)
        wanted: Box = (slice(start, stop), *(slice(0, length) for length in shape[1:]))
        for stored in self.boxes[key]:
            box = stored.box or (slice(0, 1),)
            common = intersect(box, wanted)
            if common is not None:  # a box's rows are wanted whole
                first = translate(common, box)[0]
                result[translate(common, wanted)] = stored.file.read(stored.entry, first.start, first.stop)
        return result

    def _handle(self, path: Path) -> Any:
        if path not in self._handles:
            self._handles[path] = safe_open(path, framework="pt")
        return self._handles[path]

    def _overlaps(self, key: str, wanted: Box) -> Iterator[tuple[Box, StoredBox]]:
        """The stored boxes that overlap `wanted`, each with the common box."""
        for stored in self.boxes[key]:
            common = intersect(stored.box, wanted)
            if common is not None:
                yield common, stored

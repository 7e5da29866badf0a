"""Checkpoints that any layout can load: whole or absent on disk, bit-exact for the layout that wrote them.

    <run.dir>/checkpoints/step_00000100/rank_00000.safetensors …   one file per rank
                                        complete.json              written last: step, trainer state, sizes and sha256

Tensors are named `<module>.<kind>.<Hugging Face name>@<offsets>`: boxes of Hugging Face tensors, whatever the layout.
Kinds are `weight` and, per trainable element, the optimizer's fp32 `main_weight` (left out where `weight` is fp32 and
so the same), `exp_avg` and `exp_avg_sq`. The run of elements that ZeRO-1 gives a rank is cut into boxes (at most
2 * dimensions - 1), so each rank writes only what it owns, nothing is gathered over ranks, and the save costs a copy to
the host plus the write of (weights + optimizer state) / ranks bytes each. A load reads the boxes that meet its own.

The folder must be on a file system that all ranks see. It is written as `step_….tmp` and renamed at the end; a folder
without a valid marker, or whose files have other sizes than it lists, is never loaded.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mimo_gemma4.boxes import Box, intersect, rectangles, size, translate
from mimo_gemma4.errors import CheckpointError
from mimo_gemma4.optim import ModuleOptimizer, Shard
from mimo_gemma4.weights import Binding

MARKER = "complete.json"


def save(
    folder: Path,
    step: int,
    modules: Mapping[str, ModuleOptimizer],
    trainer_state: Mapping[str, Any],
    *,
    host: dist.ProcessGroup,
    keep: int | None = None,
) -> Path:
    """Write `<folder>/step_<step>` and return it. Collective over all ranks.

    Args:
        folder: `<run.dir>/checkpoints`.
        step: finished optimizer steps.
        modules: this rank's modules by name.
        trainer_state: whatever else a resumed run needs, as JSON, equal on all ranks.
        host: gloo group over all ranks.
        keep: how many of the newest complete checkpoints stay; null: all.

    Raises `CheckpointError` on every rank where any rank cannot write; older checkpoints are then untouched.
    """
    final = folder / f"step_{step:08d}"
    partial = final.with_name(final.name + ".tmp")
    first = host.rank() == 0
    _everywhere(host, lambda: _fresh_folder(partial) if first else None)
    reports = _everywhere(host, lambda: _write_rank(partial, host.rank(), modules))
    marker = {
        "step": step,
        "trainer": dict(trainer_state),
        "update_counts": {name: count for report in reports for name, count in report["update_counts"].items()},
        "files": {report["file"]: {key: report[key] for key in ("bytes", "sha256")} for report in reports},
    }
    _everywhere(host, lambda: _publish(partial, final, marker, keep) if first else None)
    return final


def load(path: Path, modules: Mapping[str, ModuleOptimizer], *, host: dist.ProcessGroup) -> dict[str, Any]:
    """Read weights and optimizer state of this rank's modules and return the trainer state. Collective over all ranks.

    Everything is checked before anything is changed. Tensors of modules that the layout leaves out are ignored. Random
    number generators are restored on ranks that have a file of their number.

    Raises `CheckpointError`, on every rank alike, that lists all that is damaged, missing or of another shape.
    """
    marker = read_marker(path)
    if isinstance(marker, str):
        raise CheckpointError(f"checkpoint.resume: {path} cannot be loaded: {marker}")
    rank, world = host.rank(), host.size()
    _everywhere(host, lambda: _verify(path, dict(list(marker["files"].items())[rank::world])))
    contents = _Contents(path, marker["files"])
    targets = [target for name, module in modules.items() for target in _targets(name, module)]
    problems = sorted({problem for target in targets for problem in contents.problems(target)})
    everyone = sorted({problem for found in _everywhere(host, lambda: problems) for problem in found})
    if everyone:
        raise CheckpointError(
            f"checkpoint.resume: {path} does not fit the model and what it trains ({len(everyone)} tensors): "
            + "; ".join(everyone)
        )
    with torch.no_grad():
        for target in targets:
            contents.read(target)
    for name, module in modules.items():
        for count in module.step_counts:
            count.fill_(marker["update_counts"].get(name, 0))
        module.main_weights_to_model()
    _restore_random_state(path / _file_name(rank))
    return marker["trainer"]


def latest(folder: Path) -> Path | None:
    """The complete checkpoint in `folder` that was written last, or None."""
    complete = _complete(folder)
    return complete[-1] if complete else None


def resolve(resume: str, folder: Path, *, host: dist.ProcessGroup) -> Path | None:
    """The checkpoint that `checkpoint.resume` asks for, decided by rank 0 for all; None: start from the beginning.

    Args:
        resume: `auto` (the latest complete one of `folder`, if any), `never`, or the path of a checkpoint.
        folder: `<run.dir>/checkpoints`.
        host: gloo group over all ranks.

    Raises `CheckpointError` where the path is no complete checkpoint.
    """

    def decide() -> Path | None:
        if resume == "never":
            return None
        if resume == "auto":
            return latest(folder)
        marker = read_marker(Path(resume))
        if isinstance(marker, str):
            raise CheckpointError(f"checkpoint.resume: {resume} cannot be loaded: {marker}")
        return Path(resume)

    return _everywhere(host, lambda: decide() if host.rank() == 0 else None)[0]


def read_marker(path: Path) -> dict[str, Any] | str:
    """The marker of a complete checkpoint, or in words why the folder is none."""
    try:
        marker = json.loads((path / MARKER).read_text(encoding="utf-8"))
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


@dataclass(frozen=True)
class _Target:
    """A box of a Hugging Face tensor and the local elements that hold it."""

    keys: tuple[str, ...]
    """`<module>.<kind>.<name>`, the first of which that a checkpoint has is read; the first is the one written."""
    shape: tuple[int, ...]
    box: Box
    values: Tensor
    """View of the local elements, of the box's sizes."""


def _boxes(shards: Iterable[Shard], bindings: Iterable[Binding]) -> Iterator[tuple[Binding, Shard, Box, Box, Box]]:
    """Every part of a shard that a binding covers: (binding, shard, run's box, part within that box, part's HF box)."""
    by_tensor: dict[int, list[Binding]] = {}
    for binding in bindings:
        by_tensor.setdefault(id(binding.tensor), []).append(binding)
    for shard in shards:
        for run in rectangles(tuple(shard.tensor.shape), shard.start, shard.end):
            for binding in by_tensor.get(id(shard.tensor), ()):
                part = intersect(run, binding.region)
                if part is not None:
                    yield binding, shard, run, translate(part, run), translate(part, binding.region, binding.index)


def _elements(flat: Tensor, shard: Shard, run: Box, part: Box) -> Tensor:
    """The elements of `part` of the box `run`, from `flat`, the shard's elements of some kind."""
    offset = sum(cut.start * stride for cut, stride in zip(run, shard.tensor.stride(), strict=True)) - shard.start
    return flat[offset : offset + size(run)].view([cut.stop - cut.start for cut in run])[part]


def _sources(name: str, module: ModuleOptimizer) -> Iterator[_Target]:
    """What this rank writes of a module: each element of each tensor is written by one rank."""
    for binding, shard, run, part, box in _boxes(module.shards(), module.owned):
        tensors = {"weight": shard.values, **shard.state}
        if shard.state and shard.tensor.dtype == torch.float32:
            del tensors["main_weight"]
        for kind, flat in tensors.items():
            values = _elements(flat, shard, run, part)
            yield _Target((f"{name}.{kind}.{binding.name}",), binding.shape, box, values)


def _targets(name: str, module: ModuleOptimizer) -> Iterator[_Target]:
    """What this rank reads of a module: state of its trainable shards, and all of every other bound tensor.

    Trained weights follow from the main weights, which are the `weight` itself where a run in fp32 wrote it.
    """
    trainable = {id(parameter) for parameter in module.module.parameters() if parameter.requires_grad}
    rest = {id(b.tensor): b.tensor for b in module.bindings if id(b.tensor) not in trainable}
    whole = [Shard(tensor, 0, tensor.numel()) for tensor in rest.values()]
    for binding, shard, run, part, box in _boxes(module.trainable_shards + whole, module.bindings):
        for kind, flat in (shard.state or {"weight": shard.values}).items():
            kinds = ("main_weight", "weight") if kind == "main_weight" else (kind,)
            keys = tuple(f"{name}.{kind}.{binding.name}" for kind in kinds)
            yield _Target(keys, binding.shape, box, _elements(flat, shard, run, part))


class _Contents:
    """The boxes that a checkpoint's files hold, by key."""

    def __init__(self, path: Path, files: Iterable[str]):
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.boxes: dict[str, list[tuple[Box, Any, str]]] = {}
        for file in files:
            handle = safe_open(path / file, framework="pt")
            self.shapes |= {key: tuple(shape) for key, shape in json.loads(handle.metadata()["shapes"]).items()}
            for entry in handle.keys():
                key, _, offsets = entry.rpartition("@")
                if key not in self.shapes:
                    continue
                starts = [int(offset) for offset in offsets.split(",") if offset]
                sizes = handle.get_slice(entry).get_shape()
                box = tuple(slice(s, s + length) for s, length in zip(starts, sizes, strict=True))
                self.boxes.setdefault(key, []).append((box, handle, entry))

    def problems(self, target: _Target) -> list[str]:
        """Why a target cannot be read; empty where it can."""
        key = self._key(target)
        if key is None:
            return [f"{target.keys[-1]} {list(target.shape)} is missing"]
        if self.shapes[key] != target.shape:
            return [f"{key} is {list(self.shapes[key])} in the checkpoint and {list(target.shape)} in the model"]
        found = sum(size(common) for common, _, _, _ in self._meeting(key, target.box))
        return [] if found == size(target.box) else [f"{key} lacks {size(target.box) - found} elements"]

    def read(self, target: _Target) -> None:
        """Copy the target's elements into place."""
        key = self._key(target)
        assert key is not None
        for common, box, handle, entry in self._meeting(key, target.box):
            stored = handle.get_slice(entry)
            value = stored[translate(common, box)] if common else handle.get_tensor(entry)
            target.values[translate(common, target.box)].copy_(value)

    def _key(self, target: _Target) -> str | None:
        return next((key for key in target.keys if key in self.shapes), None)

    def _meeting(self, key: str, wanted: Box) -> Iterator[tuple[Box, Box, Any, str]]:
        for box, handle, entry in self.boxes[key]:
            common = intersect(box, wanted)
            if common is not None:
                yield common, box, handle, entry


def _write_rank(folder: Path, rank: int, modules: Mapping[str, ModuleOptimizer]) -> dict[str, Any]:
    tensors: dict[str, Tensor] = {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    shapes: dict[str, list[int]] = {}
    for name, module in modules.items():
        for source in _sources(name, module):
            key = source.keys[0]
            shapes[key] = list(source.shape)
            offsets = ",".join(str(cut.start) for cut in source.box)
            tensors[f"{key}@{offsets}"] = source.values.detach().to("cpu", copy=True).contiguous()
    path = folder / _file_name(rank)
    save_file(tensors, path, metadata={"shapes": json.dumps(shapes, sort_keys=True)})
    _flush(path)
    counts = {name: int(module.step_counts[0]) for name, module in modules.items() if module.step_counts}
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": _digest(path), "update_counts": counts}


def _publish(partial: Path, final: Path, marker: dict[str, Any], keep: int | None) -> None:
    """Mark the written folder as complete, give it its name, and remove checkpoints that are no longer kept."""
    unseen = [name for name, entry in marker["files"].items() if _bytes(partial / name) != entry["bytes"]]
    if unseen:
        raise CheckpointError(
            f"{partial}: rank 0 does not see the files {unseen} that other ranks wrote; run.dir must be on a file "
            "system that all ranks share"
        )
    folder = final.parent
    marker["serial"] = 1 + max((_serial(path) for path in _complete(folder)), default=0)
    (partial / MARKER).write_text(json.dumps(marker, indent=1, sort_keys=True), encoding="utf-8")
    _flush(partial / MARKER)
    _flush(partial)
    retired = final.with_name(final.name + ".old")
    _remove(path for path in folder.iterdir() if re.fullmatch(r"step_\d+\.(old|tmp)", path.name) and path != partial)
    if final.exists():  # written before the run went back to an earlier checkpoint
        final.rename(retired)
    partial.rename(final)
    _flush(folder)
    _remove([retired] if retired.exists() else [])
    _remove(_complete(folder)[:-keep] if keep else [])


def _remove(folders: Iterable[Path]) -> None:
    for path in list(folders):
        (path / MARKER).unlink(missing_ok=True)  # first, so that a removal cut short leaves nothing that looks complete
        shutil.rmtree(path)


def _complete(folder: Path) -> list[Path]:
    """Complete checkpoints in the order in which they were written."""
    found = [path for path in folder.glob("step_*") if re.fullmatch(r"step_\d+", path.name)]
    return sorted((path for path in found if not isinstance(read_marker(path), str)), key=_serial)


def _serial(path: Path) -> int:
    return json.loads((path / MARKER).read_text(encoding="utf-8"))["serial"]


def _verify(path: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    for name, entry in files.items():
        if _digest(path / name) != entry["sha256"]:
            raise CheckpointError(
                f"checkpoint.resume: {path / name} was changed after it was written (its sha256 is not the one in "
                f"{MARKER}); delete {path} to resume from an earlier checkpoint"
            )


def _restore_random_state(path: Path) -> None:
    if not path.is_file():
        return
    with safe_open(path, framework="pt") as handle:
        torch.set_rng_state(handle.get_tensor("random.cpu"))
        if torch.cuda.is_available() and "random.cuda" in handle.keys():
            torch.cuda.set_rng_state(handle.get_tensor("random.cuda"))


def _everywhere[Result](host: dist.ProcessGroup, task: Callable[[], Result]) -> list[Result]:
    """Results of `task` on all ranks, in order; where it fails on any rank, one `CheckpointError` on all of them."""
    try:
        mine: tuple[Any, str | None] = (task(), None)
    except CheckpointError as error:
        mine = (None, str(error))
    except (OSError, SafetensorError) as error:
        mine = (None, f"rank {host.rank()}: {error}")
    everyone: list[Any] = [None] * host.size()
    dist.all_gather_object(everyone, mine, group=host)
    failures = sorted({failure for _, failure in everyone if failure is not None})
    if failures:
        raise CheckpointError("; ".join(failures))
    return [result for result, _ in everyone]


def _fresh_folder(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)
    path.mkdir(parents=True)


def _flush(path: Path) -> None:
    """Wait until a file's or folder's contents are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _bytes(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _file_name(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"

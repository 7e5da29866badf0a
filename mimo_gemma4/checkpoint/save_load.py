"""Checkpoints that any layout can load: whole or absent on disk, bit-exact for the layout that wrote them.

    <run.dir>/checkpoints/step_00000100/rank_00000.safetensors …   one file per rank
                                        complete.json              written last: step, trainer state, sizes and sha256

Tensors are named `<module>.<kind>.<Hugging Face name>@<offsets>`: boxes of Hugging Face tensors, whatever the layout.
Kinds are `weight` and, per trainable element, the optimizer's fp32 `main_weight` (left out where `weight` is fp32 and
so the same), `exp_avg` and `exp_avg_sq`. The run of elements that ZeRO-1 gives a rank is cut into boxes (at most
2 * dimensions - 1), so each rank writes only what it owns, nothing is gathered over ranks, and the save costs a copy to
the host plus the write of (weights + optimizer state) / ranks bytes each. A load reads the boxes that meet its own.

Beside them a rank's file holds torch's random states (`random.cpu`, `random.cuda`), and the marker `complete.json` the
step, the optimizer's update counts by module, the trainer's state (`Trainer.save`: step, scales of adapters, names of
decoders, the record of the data and the place in them, the learning rates), and size and sha256 of every file.

The folder must be on a file system that all ranks see. It is written as `step_….tmp` and renamed at the end; a folder
without a valid marker, or whose files have other sizes than it lists, is never loaded.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mimo_gemma4.atomic import flush
from mimo_gemma4.checkpoint.boxes import Box, intersect, rectangles, size, translate
from mimo_gemma4.checkpoint.files import (
    MARKER,
    CheckpointFiles,
    complete,
    digest,
    entry_name,
    latest,
    locate,
    read_marker,
    serial,
    verify,
)
from mimo_gemma4.distributed.collective_errors import all_ranks_or_raise
from mimo_gemma4.errors import CheckpointError
from mimo_gemma4.optim.module_optimizer import ModuleOptimizer, Shard
from mimo_gemma4.weights.bindings import Binding


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
        keep: how many of the newest complete checkpoints stay; None: all.

    Raises `CheckpointError` on every rank where any rank cannot write; older checkpoints are then untouched.
    """
    final = folder / f"step_{step:08d}"
    partial = final.with_name(final.name + ".tmp")
    first = host.rank() == 0
    failed = f"{final} cannot be written: "
    _gather_or_raise(host, lambda: _fresh_folder(partial) if first else None, failed)
    reports = _gather_or_raise(host, lambda: _write_rank(partial, host.rank(), modules), failed)
    marker = {
        "step": step,
        "trainer": dict(trainer_state),
        "update_counts": {name: count for report in reports for name, count in report["update_counts"].items()},
        "files": {report["file"]: {key: report[key] for key in ("bytes", "sha256")} for report in reports},
    }
    _gather_or_raise(host, lambda: _publish(partial, final, marker, keep) if first else None, failed)
    return final


def load(
    path: Path,
    modules: Mapping[str, ModuleOptimizer],
    *,
    host: dist.ProcessGroup,
    weights_only: bool = False,
    keep: Set[str] = frozenset(),
) -> dict[str, Any]:
    """Read weights and optimizer state of this rank's modules and return the trainer state. Collective over all ranks.

    Everything is checked before anything is changed. Tensors of modules that are not in the layout are ignored. Random
    number generators are restored on ranks whose number has a file.

    With `weights_only`, or from a checkpoint that holds weights alone, moments, update counts and random number
    generators are not changed, and the returned trainer state is `{"step": 0}`. Tensors named in `keep` are not changed
    either.

    Raises the same `CheckpointError` on every rank; it lists all tensors that are damaged, missing or of another shape.
    """
    origin = "checkpoint.init_from" if weights_only else "checkpoint.resume"
    marker = read_marker(path)
    if isinstance(marker, str):
        raise CheckpointError(f"{origin}: {path} cannot be loaded: {marker}")
    weights_only |= marker.get("weights_only", False)
    rank, world = host.rank(), host.size()
    _gather_or_raise(host, lambda: verify(path, dict(list(marker["files"].items())[rank::world])))
    contents = CheckpointFiles(path, marker["files"])
    kinds = ("weight", "main_weight") if weights_only else ("weight", "main_weight", "exp_avg", "exp_avg_sq")
    targets = [target for name, module in modules.items() for target in _targets(name, module, kinds, keep)]
    problems = sorted({problem for target in targets for problem in _problems(contents, target)})
    everyone = sorted({problem for found in _gather_or_raise(host, lambda: problems) for problem in found})
    if everyone:
        raise CheckpointError(
            f"{origin}: {path} does not fit the model and what it trains ({len(everyone)} tensors): "
            + "; ".join(everyone)
        )
    with torch.no_grad():
        for target in targets:
            key = _key(contents, target)
            assert key is not None
            contents.read(key, target.box, target.values)
    for name, module in modules.items():
        if not weights_only:
            for count in module.step_counts:
                count.fill_(marker["update_counts"].get(name, 0))
        module.main_weights_to_model()
    if weights_only:
        return {"step": 0}
    _restore_random_state(path / _file_name(rank))
    trainer_state: dict[str, Any] = marker["trainer"]
    return trainer_state


def resolve(resume: str, folder: Path, *, host: dist.ProcessGroup) -> Path | None:
    """The checkpoint to resume from, decided by rank 0 for all ranks; None: start from the beginning.

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

    return _gather_or_raise(host, lambda: decide() if host.rank() == 0 else None)[0]


def initial(init_from: str, *, host: dist.ProcessGroup) -> Path:
    """The checkpoint that `checkpoint.init_from` names, itself or as the newest of a run directory; rank 0 decides.

    Raises `CheckpointError` where there is none.
    """

    def decide() -> Path:
        try:
            return locate(Path(init_from))
        except CheckpointError as error:
            raise CheckpointError(f"checkpoint.init_from: {error}") from error

    found = _gather_or_raise(host, lambda: decide() if host.rank() == 0 else None)[0]
    assert found is not None
    return found


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
    """Every part of a shard that a binding covers.

    Yields (binding, shard, box of the run in the local tensor, the part relative to that box, the part's box in the
    Hugging Face tensor).
    """
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
    """The elements of `part` of the box `run`. `flat`: all elements of the shard, of any kind."""
    offset = sum(cut.start * stride for cut, stride in zip(run, shard.tensor.stride(), strict=True)) - shard.start
    return flat[offset : offset + size(run)].view([cut.stop - cut.start for cut in run])[part]


def _sources(name: str, module: ModuleOptimizer) -> Iterator[_Target]:
    """What this rank writes of a module. Each element of each tensor is written by exactly one rank."""
    for binding, shard, run, part, box in _boxes(module.shards(), module.owned):
        tensors = {"weight": shard.values, **shard.state}
        if shard.state and shard.tensor.dtype == torch.float32:
            del tensors["main_weight"]
        for kind, flat in tensors.items():
            values = _elements(flat, shard, run, part)
            yield _Target((f"{name}.{kind}.{binding.name}",), binding.shape, box, values)


def _targets(name: str, module: ModuleOptimizer, wanted: Sequence[str], keep: Set[str]) -> Iterator[_Target]:
    """What this rank reads of a module: the state of its trainable shards, and every other bound tensor as a whole.

    Trained weights are computed from the main weights, which are the `weight` itself in a checkpoint of an fp32 run.
    """
    trainable = {id(parameter) for parameter in module.module.parameters() if parameter.requires_grad}
    rest = {id(b.tensor): b.tensor for b in module.bindings if id(b.tensor) not in trainable}
    whole = [Shard(tensor, 0, tensor.numel()) for tensor in rest.values()]
    bindings = [binding for binding in module.bindings if binding.name not in keep]
    for binding, shard, run, part, box in _boxes(module.trainable_shards + whole, bindings):
        for kind, flat in (shard.state or {"weight": shard.values}).items():
            if kind in wanted:
                kinds = ("main_weight", "weight") if kind == "main_weight" else (kind,)
                keys = [f"{name}.{kind}.{binding.name}" for kind in kinds]
                if "weight" in kinds:
                    keys.append(f"weight.{binding.name}")  # converted: it belongs to no module yet
                yield _Target(tuple(keys), binding.shape, box, _elements(flat, shard, run, part))


def _key(contents: CheckpointFiles, target: _Target) -> str | None:
    return next((key for key in target.keys if key in contents.shapes), None)


def _problems(contents: CheckpointFiles, target: _Target) -> list[str]:
    """Why a target cannot be read; empty where it can."""
    key = _key(contents, target)
    if key is None:
        return [f"{target.keys[0]} {list(target.shape)} is missing"]
    if contents.shapes[key] != target.shape:
        return [f"{key} is {list(contents.shapes[key])} in the checkpoint and {list(target.shape)} in the model"]
    lacking = contents.lacking(key, target.box)
    return [f"{key} lacks {lacking} elements"] if lacking else []


def _write_rank(folder: Path, rank: int, modules: Mapping[str, ModuleOptimizer]) -> dict[str, Any]:
    tensors: dict[str, Tensor] = {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    shapes: dict[str, list[int]] = {}
    for name, module in modules.items():
        for source in _sources(name, module):
            key = source.keys[0]
            shapes[key] = list(source.shape)
            entry = entry_name(key, (cut.start for cut in source.box))
            tensors[entry] = source.values.detach().to("cpu", copy=True).contiguous()
    path = folder / _file_name(rank)
    save_file(tensors, path, metadata={"shapes": json.dumps(shapes, sort_keys=True)})
    flush(path)
    counts = {name: int(module.step_counts[0]) for name, module in modules.items() if module.step_counts}
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": digest(path), "update_counts": counts}


def _publish(partial: Path, final: Path, marker: dict[str, Any], keep: int | None) -> None:
    """Mark the written folder as complete, give it its name, and remove checkpoints that are no longer kept."""
    unseen = [name for name, entry in marker["files"].items() if _bytes(partial / name) != entry["bytes"]]
    if unseen:
        raise CheckpointError(
            f"{partial}: rank 0 does not see the files {unseen} that other ranks wrote; run.dir must be on a file "
            "system that all ranks share"
        )
    folder = final.parent
    marker["serial"] = 1 + max((serial(path) for path in complete(folder)), default=0)
    (partial / MARKER).write_text(json.dumps(marker, indent=1, sort_keys=True), encoding="utf-8")
    flush(partial / MARKER)
    flush(partial)
    retired = final.with_name(final.name + ".old")
    _remove(path for path in folder.iterdir() if re.fullmatch(r"step_\d+\.(old|tmp)", path.name) and path != partial)
    if final.exists():  # written before the run went back to an earlier checkpoint
        final.rename(retired)
    partial.rename(final)
    flush(folder)
    _remove([retired] if retired.exists() else [])
    _remove(complete(folder)[:-keep] if keep else [])


def _remove(folders: Iterable[Path]) -> None:
    for path in list(folders):
        (path / MARKER).unlink(missing_ok=True)  # first, so that a removal cut short leaves nothing that looks complete
        shutil.rmtree(path)


def _restore_random_state(path: Path) -> None:
    if not path.is_file():
        return
    with safe_open(path, framework="pt") as handle:
        torch.set_rng_state(handle.get_tensor("random.cpu"))
        if torch.cuda.is_available() and "random.cuda" in handle.keys():
            torch.cuda.set_rng_state(handle.get_tensor("random.cuda"))


def _gather_or_raise[Result](host: dist.ProcessGroup, task: Callable[[], Result], failed: str = "") -> list[Result]:
    """Results of `task` on all ranks, in rank order; where it fails on any rank, the same `CheckpointError` on all.

    Its message is `failed` and the different messages of all ranks that failed. An error of another kind than a
    checkpoint or file error is raised by `all_ranks_or_raise`.
    """

    def attempt() -> tuple[Any, str | None]:
        try:
            return task(), None
        except CheckpointError as error:
            return None, str(error)
        except (OSError, SafetensorError) as error:
            return None, f"rank {host.rank()}: {error}"

    everyone: list[Any] = [None] * host.size()
    dist.all_gather_object(everyone, all_ranks_or_raise(host, attempt), group=host)
    failures = sorted({failure for _, failure in everyone if failure is not None})
    if failures:
        raise CheckpointError(failed + "; ".join(failures))
    return [result for result, _ in everyone]


def _fresh_folder(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)
    path.mkdir(parents=True)


def _bytes(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _file_name(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"

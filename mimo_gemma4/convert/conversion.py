"""Converts Hugging Face directories to checkpoints and back, tensor by tensor and a few rows at a time.

Nothing here knows the architecture: tensors are matched by name, so every variant, trained in part or as a whole, takes
the same path, and a tensor that is not cast keeps its bits. Memory stays at a few pieces of
`safetensors_rows.PIECE_BYTES`, whatever the size of the model.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Set
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from mimo_gemma4.atomic import flush, new_folder
from mimo_gemma4.checkpoint.files import MARKER, CheckpointFiles, entry_name, locate, read_marker, verify
from mimo_gemma4.config import ModelConfig
from mimo_gemma4.config.presets import TEXT_ONLY, load_model_config, read_config
from mimo_gemma4.convert.model_files import FOLDER, ORIGIN, Origin, belongs_to, copy_model_files
from mimo_gemma4.errors import CheckpointError
from mimo_gemma4.weights.bindings import DECODERS, whole
from mimo_gemma4.weights.huggingface import LANGUAGE, LISTING, SINGLE, HuggingFaceSource, StoredTensor, count_by_part
from mimo_gemma4.weights.lora_files import A, B, TrainedAdapters, adapted_linears
from mimo_gemma4.weights.safetensors_rows import DTYPES, TensorEntry, split_into_files, total_bytes, write_tensor_file

logger = logging.getLogger(__name__)

Bar = Callable[[str, int], AbstractContextManager[Callable[[int], object]]]
"""Shows progress: from a description and a total of bytes to a context that yields the function to advance it."""
FLOATS = ("BF16", "F16", "F32", "F64")
EXPORT_DTYPES = {"bf16": ("BF16", "bfloat16"), "fp32": ("F32", "float32")}
"""Names of an exported element type in safetensors files and in `config.json`."""


def from_hf(source: Path, output: Path, *, file_bytes: int, bar: Bar) -> int:
    """Write a Hugging Face directory as a checkpoint of weights alone, which any layout can start from.

    Args:
        source: directory with `config.json`, safetensors files, tokenizer and so on.
        output: the checkpoint; must not exist.
        file_bytes: largest file of weights, unless a single tensor is larger.
        bar: shows progress.

    Returns:
        Bytes of tensors.

    Raises:
        ConfigError: `source` has no Gemma 4 configuration.
        CheckpointError: `source` lacks weights, or has a head of its own; `output` exists.
    """
    load_model_config(ModelConfig(hf_path=str(source)))
    weights = HuggingFaceSource(source)
    weights.check_head()
    entries = {name: tensor.entry for name, tensor in weights.tensors.items()}
    total = total_bytes(entries.values())
    with new_folder(output) as folder, bar("from Hugging Face", total) as advance:
        files: dict[str, dict[str, Any]] = {}
        for number, names in enumerate(split_into_files(entries, file_bytes)):
            path, checksum = folder / f"weights_{number:05d}.safetensors", hashlib.sha256()
            keys = {f"weight.{name}": name for name in names}
            stored = {entry_name(key, [0] * len(entries[name].shape)): name for key, name in keys.items()}
            write_tensor_file(
                path,
                {entry: entries[name] for entry, name in stored.items()},
                _renamed(weights, stored),
                metadata={"shapes": json.dumps({key: entries[name].shape for key, name in keys.items()})},
                advance=advance,
                checksum=checksum,
            )
            files[path.name] = {"bytes": path.stat().st_size, "sha256": checksum.hexdigest()}
        copy_model_files(source, folder / FOLDER)
        Origin.of(weights).save(folder / FOLDER)
        marker = {"step": 0, "trainer": {"step": 0}, "update_counts": {}, "weights_only": True, "serial": 1}
        (folder / MARKER).write_text(json.dumps(marker | {"files": files}, indent=1, sort_keys=True), encoding="utf-8")
        flush(folder / MARKER)
    return total


def to_hf(checkpoint: Path, output: Path, *, source: Path | None, dtype: str | None, file_bytes: int, bar: Bar) -> int:
    """Write a checkpoint as a Hugging Face directory that transformers, and `model.hf_path`, can load.

    Tensors that the checkpoint lacks (of modules that were not in the layout) are copied from the directory that the
    model came from. Adapters are merged into the weights they adapt. The tied head and decoders are not written.

    Args:
        checkpoint: one of ours, or a run directory, whose newest is taken.
        output: the Hugging Face directory; must not exist.
        source: the directory that the model came from; None: where it was when training began.
        dtype: `bf16` or `fp32` for every floating point tensor; None: as in the source, or, for a model that
            began with random weights, as trained. Types wider than the trained weights take the fp32 main weights.
        file_bytes: largest file of weights, unless a single tensor is larger.
        bar: shows progress.

    Returns:
        Bytes of tensors.

    Raises:
        CheckpointError: there is no complete checkpoint, a file of it is damaged, tensors are neither in it nor in the
            source, or `output` exists.
    """
    path = locate(checkpoint)
    marker = read_marker(path)
    assert not isinstance(marker, str)
    verify(path, marker["files"])
    contents = CheckpointFiles(path, marker["files"])
    model_files = _model_files(path, source)
    tensors = _collect(contents, _adapters(contents, marker), model_files, source, dtype)
    entries = {tensor.name: tensor.entry for tensor in tensors}
    reads = {tensor.name: tensor.read for tensor in tensors}
    total = total_bytes(entries.values())
    with new_folder(output) as folder, bar("to Hugging Face", total) as advance:
        copy_model_files(model_files, folder)
        (folder / ORIGIN).unlink(missing_ok=True)
        if dtype is not None:
            _set_dtype(folder / "config.json", EXPORT_DTYPES[dtype][1])
        shards = split_into_files(entries, file_bytes)
        weight_map: dict[str, str] = {}
        for number, names in enumerate(shards, start=1):
            file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else SINGLE
            weight_map |= dict.fromkeys(names, file_name)
            write_tensor_file(
                folder / file_name,
                {name: entries[name] for name in names},
                lambda name, start, stop: reads[name](start, stop),
                metadata={"format": "pt"},
                advance=advance,
            )
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (folder / LISTING).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return total


def to_adapter(checkpoint: Path, output: Path, *, source: Path | None) -> int:
    """Write a checkpoint's adapters, in fp32, as a folder that `peft.PeftModel.from_pretrained` loads.

    Args:
        checkpoint: one of ours, or a run directory, whose newest is taken.
        output: the folder; must not exist.
        source: the directory that the model came from; None: where it was when training began.

    Returns:
        Bytes of tensors.

    Raises `CheckpointError` where the checkpoint is damaged, has no adapters, or has trained other weights too.
    """
    path = locate(checkpoint)
    marker = read_marker(path)
    assert not isinstance(marker, str)
    verify(path, marker["files"])
    contents = CheckpointFiles(path, marker["files"])
    adapters = _adapters(contents, marker)
    if not adapters.scales:
        raise CheckpointError(f"{path} has no adapters; leave --lora out to export its weights")
    others = sorted(name for name in _without_decoders(contents.keys("exp_avg")) if not name.endswith((A, B)))
    if others:
        raise CheckpointError(
            f"{path} has trained {len(others)} tensors beside its adapters, such as {others[0]}, which an adapter "
            "cannot hold; use --lora merge"
        )
    model_files = _model_files(path, source)
    origin, config = Origin.load(model_files), read_config(model_files)
    base = source if source is not None else None if origin is None else origin.path
    with new_folder(output) as folder:
        text_only = config.get("model_type") in TEXT_ONLY
        adapters.save(folder, None if base is None else str(base), text_only=text_only)
    return sum(tensor.nbytes for tensor in adapters.tensors.values())


def _renamed(weights: HuggingFaceSource, names: Mapping[str, str]) -> Callable[[str, int, int], Tensor]:
    return lambda entry, start, stop: weights.rows(names[entry], start, stop)


@dataclass(frozen=True)
class _Export:
    """A tensor of the directory to write."""

    name: str
    entry: TensorEntry
    read: Callable[[int, int], Tensor]
    """Its rows `[start, stop)`."""


def _model_files(checkpoint: Path, source: Path | None) -> Path:
    """The folder with the model's configuration and tokenizer. Raises `CheckpointError` where there is none."""
    if source is not None and not (source / "config.json").is_file():
        raise CheckpointError(f"--source {source} has no config.json; give the Hugging Face directory of the model")
    kept = [checkpoint / FOLDER, checkpoint.parent.parent / FOLDER]
    for folder in kept:  # a run may have replaced an encoder of the source: its own folder describes the result
        if (folder / "config.json").is_file() and (source is None or (folder / ORIGIN).is_file()):
            return folder
    if source is not None:
        return source
    raise CheckpointError(
        f"neither {kept[0]} nor {kept[1]} has the configuration of {checkpoint}; give --source DIR, the Hugging Face "
        "directory that its training started from"
    )


def _adapters(contents: CheckpointFiles, marker: Mapping[str, Any]) -> TrainedAdapters:
    """The checkpoint's adapters, all in memory (they are small); from main weights where it has them."""
    scale_of = marker["trainer"].get("lora", {})
    keys = contents.keys("weight")
    scales = {linear: scale_of[keys[linear + A].partition(".")[0]] for linear in adapted_linears(keys)}
    keys |= contents.keys("main_weight")
    names = [linear + end for linear in scales for end in (A, B)]
    return TrainedAdapters(
        {name: contents.rows(keys[name], 0, contents.shapes[keys[name]][0]) for name in names}, scales
    )


def _collect(
    contents: CheckpointFiles, adapters: TrainedAdapters, model_files: Path, source: Path | None, dtype: str | None
) -> list[_Export]:
    """Every tensor to export: those of the source in its order, then those that the source lacks."""
    origin, weights = Origin.load(model_files), None
    if source is not None:
        if origin is None:
            weights = HuggingFaceSource(source)
            origin = Origin.of(weights)
        origin = replace(origin, path=source.resolve())
    known = {} if origin is None else dict(origin.tensors)
    trained, main = contents.keys("weight"), contents.keys("main_weight")
    trained = {name: key for name, key in _without_decoders(trained).items() if name not in adapters.tensors}
    _check_encoders(trained, known, model_files)
    _check_shapes(contents, trained, known, model_files)
    left_out = known.keys() - trained.keys()
    if left_out and weights is None:
        assert origin is not None
        weights = _reopen(origin, left_out, model_files)
    exports = []
    for name in [*known, *(name for name in trained if name not in known)]:
        stored = known.get(name)
        if name in trained:
            exports.append(_from_checkpoint(contents, adapters, trained[name], main.get(name), name, stored, dtype))
        elif weights is not None:
            exports.append(_from_source(weights, name, known[name], dtype))
    return exports


def _without_decoders(keys: Mapping[str, str]) -> dict[str, str]:
    """The keys without those of decoders, which are not part of Gemma 4; logs which are left out."""
    left_out = sorted({name.split(".")[1] for name in keys if name.startswith(DECODERS)})
    if left_out:
        logger.warning("decoders are no part of Gemma 4 and are left out: %s", ", ".join(left_out))
    return {name: key for name, key in keys.items() if not name.startswith(DECODERS)}


def _check_encoders(trained: Mapping[str, str], known: Mapping[str, StoredTensor], model_files: Path) -> None:
    """Raise `CheckpointError` where the checkpoint has another encoder than the model whose files would describe it."""
    for module in {key.partition(".")[0] for name, key in trained.items() if name not in known}:
        if any(name not in trained and belongs_to(name, module) for name in known):
            raise CheckpointError(
                f"the checkpoint's {module} encoder is not the one of {model_files}: export it from its run directory, "
                f"whose folder {FOLDER} describes both"
            )


def _check_shapes(
    contents: CheckpointFiles, keys: Mapping[str, str], known: Mapping[str, StoredTensor], model_files: Path
) -> None:
    pairs = [(name, contents.shapes[key], known[name].entry.shape) for name, key in keys.items() if name in known]
    wrong = [f"{name} is {list(here)} here and {list(there)} there" for name, here, there in pairs if here != there]
    if wrong:
        raise CheckpointError(f"the checkpoint is not of the model in {model_files}: " + "; ".join(wrong))


def _reopen(origin: Origin, names: Set[str], model_files: Path) -> HuggingFaceSource | None:
    """The directory that the model came from, or None where it is gone and not needed.

    Raises `CheckpointError` where it is needed and gone, or its tensors `names` have changed.
    """
    if not origin.path.is_dir():
        used = names - _unused(model_files)
        if not used:
            return None
        parts = ", ".join(f"{count} of {part}" for part, count in count_by_part(used).items())
        raise CheckpointError(
            f"the checkpoint lacks {len(used)} tensors of the model ({parts}), and {origin.path}, which training "
            "started from, is gone; give --source DIR, the place where that Hugging Face directory is now"
        )
    weights = HuggingFaceSource(origin.path)
    changed = sorted(name for name in names if weights.tensors.get(name) != origin.tensors[name])
    if changed:
        raise CheckpointError(f"{origin.path} has changed since training started from it: {', '.join(changed)}")
    return weights


def _unused(model_files: Path) -> set[str]:
    """Tensors that files may hold but the model does not use."""
    from mimo_gemma4.language.config import Gemma4TextConfig  # heavy, and seldom needed

    config = load_model_config(ModelConfig(hf_path=str(model_files)))
    return set(Gemma4TextConfig.from_hf(config).unused_tensors(LANGUAGE))


def _from_checkpoint(
    contents: CheckpointFiles,
    adapters: TrainedAdapters,
    weight: str,
    main: str | None,
    name: str,
    stored: StoredTensor | None,
    dtype: str | None,
) -> _Export:
    """The export of a tensor that the checkpoint holds under the keys `weight` and, if trained in bf16, `main`."""
    own = contents.entry(weight)
    entry = _target_entry(own if stored is None else stored.entry, dtype)
    wider = DTYPES[entry.dtype].itemsize > DTYPES[own.dtype].itemsize
    key = main if wider and main is not None else weight
    if lacking := contents.lacking(key, whole(own.shape)):
        raise CheckpointError(f"the checkpoint lacks {lacking} elements of {key}")

    def read(start: int, stop: int) -> Tensor:
        rows = contents.rows(key, start, stop)
        if name.removesuffix(".weight") in adapters.scales:
            rows = adapters.merged(name, rows.float(), start)  # rounded once, after the sum
        return rows.to(DTYPES[entry.dtype])

    return _Export(name if stored is None else stored.name, entry, read)


def _from_source(weights: HuggingFaceSource, name: str, stored: StoredTensor, dtype: str | None) -> _Export:
    entry = _target_entry(stored.entry, dtype)

    def read(start: int, stop: int) -> Tensor:
        return weights.rows(name, start, stop).to(DTYPES[entry.dtype])

    return _Export(stored.name, entry, read)


def _target_entry(entry: TensorEntry, dtype: str | None) -> TensorEntry:
    """`entry` with the element type to export, where its elements are floating point numbers."""
    if dtype is None or entry.dtype not in FLOATS:
        return entry
    return TensorEntry(EXPORT_DTYPES[dtype][0], entry.shape)


def _set_dtype(path: Path, dtype: str) -> None:
    """Set the element type of all weights wherever `config.json` names it."""

    def replaced(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {key: dtype if key in ("dtype", "torch_dtype") else replaced(inner) for key, inner in value.items()}

    config = replaced(json.loads(path.read_text(encoding="utf-8"))) | {"dtype": dtype}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")

"""The files of a model beside its weights: configuration, tokenizer, processor, chat template, generation config.

A run keeps them in `<run.dir>/huggingface`, a converted checkpoint in `<checkpoint>/huggingface`, together with
`source.json`, which names the directory that the weights came from and its tensors, so that the model can be exported
in the same form. The folder serves as `model.hf_path` where a checkpoint gives the weights.
"""

import json
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mimo_gemma4.config import ModelConfig
from mimo_gemma4.data.tokenizer import byte_tokenizer
from mimo_gemma4.errors import CheckpointError
from mimo_gemma4.weights.huggingface import HuggingFaceSource, StoredTensor, part_of_model
from mimo_gemma4.weights.safetensors_rows import TensorEntry

FOLDER = "huggingface"
ORIGIN = "source.json"
_KEPT = ("*.json", "*.jinja", "*.model", "*.txt", "additional_chat_templates/*.jinja")


@dataclass(frozen=True)
class Origin:
    """The Hugging Face directory that a model came from, and its tensors by name here, head excluded."""

    path: Path
    tensors: Mapping[str, StoredTensor]

    @classmethod
    def of(cls, source: HuggingFaceSource) -> "Origin":
        """What `source` holds."""
        return cls(source.path.resolve(), source.tensors)

    @classmethod
    def load(cls, folder: Path) -> "Origin | None":
        """The origin that a folder of model files names; None for a model that began with random weights."""
        path = folder / ORIGIN
        if not path.is_file():
            return None
        try:
            written = json.loads(path.read_text(encoding="utf-8"))
            tensors = {
                name: StoredTensor(stored, TensorEntry(dtype, tuple(shape)))
                for name, (stored, dtype, shape) in written["tensors"].items()
            }
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is damaged: {error!r}") from error
        return cls(Path(written["path"]), tensors)

    def without(self, modules: Collection[str]) -> "Origin":
        """The same without the tensors of these modules, which come from directories of their own."""
        kept = {n: t for n, t in self.tensors.items() if not any(belongs_to(n, module) for module in modules)}
        return Origin(self.path, kept)

    def save(self, folder: Path) -> None:
        """Write `source.json`."""
        tensors = {name: (t.name, t.entry.dtype, t.entry.shape) for name, t in self.tensors.items()}
        (folder / ORIGIN).write_text(json.dumps({"path": str(self.path), "tensors": tensors}), encoding="utf-8")


def belongs_to(tensor: str, modality: str) -> bool:
    """Whether a tensor is named like one of an encoder of this modality, Gemma's or another."""
    part = part_of_model(tensor)
    return modality in part or (modality == "vision" and "multi_modal_projector" in part)


def copy_model_files(source: Path, target: Path) -> None:
    """Copy everything but weights and their listing from a Hugging Face directory into the folder `target`."""
    target.mkdir(exist_ok=True)
    for path in (path for pattern in _KEPT for path in source.glob(pattern)):
        if path.is_file() and not path.name.endswith(".index.json"):
            copy = target / path.relative_to(source)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)


def keep_model_files(
    folder: Path,
    model: ModelConfig,
    hf_config: Mapping[str, Any],
    modules: Collection[str],
    replaced: Collection[str] = (),
) -> None:
    """Put the files of the model to train into `folder`, in place of those of an earlier run.

    Args:
        folder: `<run.dir>/huggingface`.
        model: the run's model options.
        hf_config: the model configuration that these options give.
        modules: names of the modules of the layout; a model of a preset has no others.
        replaced: names of encoders that come from directories of their own, which the files then describe.
    """
    if model.hf_path is not None and Path(model.hf_path).resolve() == folder.resolve():
        return
    partial = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(partial, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    if model.hf_path is None:
        partial.mkdir()
        dtype = "float32" if model.precision == "fp32" else "bfloat16"
        config = {"architectures": ["Gemma4ForConditionalGeneration"], "dtype": dtype, **hf_config}
        absent = [key for key in config if key.endswith("_config") and key[: -len("_config")] not in ("text", *modules)]
        (partial / "config.json").write_text(
            json.dumps(config | dict.fromkeys(absent), indent=2, sort_keys=True), encoding="utf-8"
        )
        byte_tokenizer().save_pretrained(str(partial))
    else:
        source = Path(model.hf_path)
        copy_model_files(source, partial)
        origin = Origin.load(partial)
        if origin is None and any(source.glob("*.safetensors")):
            origin = Origin.of(HuggingFaceSource(source))
        if origin is not None:
            origin.without(replaced).save(partial)
        _describe(partial / "config.json", hf_config, replaced)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def _describe(path: Path, hf_config: Mapping[str, Any], modules: Collection[str]) -> None:
    """Put the sections of `modules` in `hf_config` into the file `config.json`."""
    if not modules:
        return
    config = json.loads(path.read_text(encoding="utf-8"))
    for key in (f"{name}_{part}" for name in modules for part in ("config", "processor")):
        config.pop(key, None)
        if key in hf_config:
            config[key] = hf_config[key]
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")

"""Adapters outside of a training run: in PEFT's files, or merged into the weights that they adapt.

PEFT stores an adapter as `adapter_config.json` and `adapter_model.safetensors`; its tensors are named
`base_model.model.<linear>.lora_A.weight` [rank, inputs] and `.lora_B.weight` [outputs, rank].
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mimo_gemma4.config import LoraConfig
from mimo_gemma4.errors import CheckpointError, ConfigError
from mimo_gemma4.weights.bindings import Index

CONFIG, TENSORS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
A, B = ".lora_A.weight", ".lora_B.weight"


def adapted_linears(names: Iterable[str]) -> list[str]:
    """Sorted names of the linears that have adapters, from the names of tensors."""
    return sorted(name.removesuffix(A) for name in names if name.endswith(A))


@dataclass(frozen=True)
class TrainedAdapters:
    """Adapters that a run has trained."""

    tensors: Mapping[str, Tensor]
    """A and B under their names in a checkpoint, `<linear>.lora_A.weight` and so on; may be read on access."""
    scales: Mapping[str, float]
    """By linear, the factor of its B A."""

    def merged(self, name: str, rows: Tensor, start: int = 0) -> Tensor:
        """`rows` of the Hugging Face tensor `name`, from number `start` on, plus its adapter's product in fp32.

        Rows of a tensor without adapter are returned unchanged.
        """
        linear = name.removesuffix(".weight")
        if linear not in self.scales:
            return rows
        a, b = (self.tensors[linear + end].float() for end in (A, B))
        return torch.addmm(rows.float(), b[start : start + len(rows)], a, alpha=self.scales[linear]).to(rows.dtype)

    def save(self, folder: Path, base_model: str | None) -> None:
        """Write a folder that `peft.PeftModel.from_pretrained` loads onto the model `base_model` (path or name)."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            PREFIX + linear + end: self.tensors[linear + end].contiguous() for linear in self.scales for end in (A, B)
        }
        save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
        ranks = {linear: len(tensors[PREFIX + linear + A]) for linear in sorted(self.scales)}
        text = json.dumps(_peft_config(ranks, self.scales, base_model), indent=2, sort_keys=True)
        (folder / CONFIG).write_text(text, encoding="utf-8")


def _peft_config(ranks: Mapping[str, int], scales: Mapping[str, float], base_model: str | None) -> dict[str, Any]:
    """`adapter_config.json`: rank and alpha of the first linear, and patterns for linears with others."""
    alphas = {linear: scales[linear] * rank for linear, rank in ranks.items()}
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {linear: other for linear, other in ranks.items() if other != rank},
        "alpha_pattern": {linear: other for linear, other in alphas.items() if other != alpha},
        "target_modules": sorted(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }


class AdapterSource:
    """Reads A and B of a module from the folder of a PEFT adapter."""

    def __init__(self, folder: Path, key: str, lora: LoraConfig):
        """Open the folder and compare it with the configuration.

        Args:
            folder: holds `adapter_config.json` and `adapter_model.safetensors`.
            key: key of `lora` in the configuration, for messages.
            lora: rank and scale that the run expects.

        Raises `ConfigError` if rank, scale or method differ, `CheckpointError` if files are missing.
        """
        self.folder, self.key = folder, key
        missing = [name for name in (CONFIG, TENSORS) if not (folder / name).is_file()]
        if missing:
            raise CheckpointError(f"{key}.path {folder} lacks {' and '.join(missing)}; it must be a PEFT adapter")
        _check_config(json.loads((folder / CONFIG).read_text(encoding="utf-8")), folder, key, lora)
        self._tensors = safe_open(folder / TENSORS, framework="pt")
        self.names = {name.removeprefix(PREFIX) for name in self._tensors.keys()}

    def read(self, name: str, index: Index, shape: tuple[int, ...]) -> Tensor | None:
        """The slice `index` of `name`; None where the adapter lacks it. Raises `CheckpointError` for another shape."""
        if name not in self.names:
            return None
        stored = self._tensors.get_slice(PREFIX + name)
        if tuple(stored.get_shape()) != shape:
            raise CheckpointError(
                f"{self.key}.path {self.folder}: {name} is {stored.get_shape()} where the model has {list(shape)}"
            )
        return stored[index]

    def check_all_read(self, linears: Iterable[str], adapted: Iterable[str]) -> None:
        """Raise `ConfigError` if the folder adapts linears of the module that the configuration does not adapt.

        Args:
            linears: names, without `.weight`, of all weights of the module.
            adapted: names of the linears that get an adapter.
        """
        left = sorted(set(adapted_linears(self.names)) & set(linears) - set(adapted))
        if left:
            raise ConfigError(
                f"{self.key}.path {self.folder} also adapts {len(left)} linears, such as {left[0]!r}, that no pattern "
                f"of {self.key}.targets matches: add one, for their part of the adapter would be lost"
            )


def _check_config(peft: Mapping[str, Any], folder: Path, key: str, lora: LoraConfig) -> None:
    """Raise `ConfigError` if a PEFT configuration does not match `lora`."""
    beyond = ("use_dora", "lora_bias", "rank_pattern", "alpha_pattern", "modules_to_save")
    used = [name for name in beyond if peft.get(name)]
    if peft.get("peft_type") != "LORA" or used:
        what = ", ".join(used) or f"peft_type {peft.get('peft_type')}"
        raise ConfigError(f"{key}.path {folder}: {what} is not supported; it must be plain LoRA of one rank and alpha")
    rank, alpha = peft["r"], peft["lora_alpha"]
    scale = alpha / (math.sqrt(rank) if peft.get("use_rslora") else rank)
    if rank != lora.rank or not math.isclose(scale, lora.scale):
        raise ConfigError(
            f"{key}.path {folder} has r {rank} and a scale of {scale:g}, but {key} asks for rank {lora.rank} and a "
            f"scale of {lora.scale:g}: set rank and alpha to the adapter's"
        )

"""Adapters outside of a training run: in PEFT's files, or merged into the weights that they adapt.

PEFT stores an adapter as `adapter_config.json` and `adapter_model.safetensors`; its tensors are named
`base_model.model.<linear>.lora_A.weight` [rank, inputs] and `.lora_B.weight` [outputs, rank]. Linears are named as in
transformers' class of the model, so those of a text-only `Gemma4ForCausalLM` as `model.layers.0…`.
"""

import json
import math
import re
from collections.abc import Collection, Iterable, Mapping
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
from mimo_gemma4.weights.huggingface import LANGUAGE, translation
from mimo_gemma4.weights.safetensors_rows import TensorFile

CONFIG, TENSORS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
A, B = ".lora_A.weight", ".lora_B.weight"
TEXT_ONLY = "model."
"""What stands for `LANGUAGE` in the names of a text-only model."""
FREE_KEYS = frozenset(
    "alpha_pattern auto_mapping base_model_name_or_path corda_config eva_config exclude_modules inference_mode "
    "init_lora_weights layers_pattern layers_to_transform loftq_config lora_alpha lora_dropout lora_ga_config "
    "megatron_config megatron_core peft_type peft_version qalora_group_size r rank_pattern revision target_modules "
    "task_type use_rslora".split()
)
"""Keys of `adapter_config.json` that are read here, or that say which linears are adapted, which the tensors show, or
how training began. Any other key that is set changes what the model computes."""
BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Values of `init_lora_weights` that also change the weights beside the adapter, so that it does not fit the model."""
UNSET: tuple[Any, ...] = (None, False, "", "none", [], {})
"""Values of keys that change nothing."""


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

    def save(self, folder: Path, base_model: str | None, *, text_only: bool = False) -> None:
        """Write a folder that `peft.PeftModel.from_pretrained` loads onto the model `base_model` (path or name).

        `text_only`: that model is a `Gemma4ForCausalLM`, so linears are named as there.
        """
        folder.mkdir(parents=True, exist_ok=True)
        names = {linear: _text_only_name(linear) if text_only else linear for linear in self.scales}
        tensors = {
            PREFIX + name + end: self.tensors[linear + end].contiguous()
            for linear, name in names.items()
            for end in (A, B)
        }
        save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
        ranks = {names[linear]: len(self.tensors[linear + A]) for linear in sorted(self.scales)}
        scales = {names[linear]: scale for linear, scale in self.scales.items()}
        text = json.dumps(_peft_config(ranks, scales, base_model), indent=2, sort_keys=True)
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


def _text_only_name(linear: str) -> str:
    """The name of a linear in a text-only model. Raises `CheckpointError` where such a model has no such linear."""
    if not linear.startswith(LANGUAGE):
        raise CheckpointError(f"{linear} has an adapter, but the model that training started from is text alone")
    return TEXT_ONLY + linear.removeprefix(LANGUAGE)


class AdapterSource:
    """Reads A and B of a module from the folder of a PEFT adapter."""

    def __init__(self, folder: Path, key: str, lora: LoraConfig):
        """Open the folder and compare it with the configuration.

        Args:
            folder: holds `adapter_config.json` and `adapter_model.safetensors`.
            key: key of `lora` in the configuration, for messages.
            lora: rank and scale that the run expects.

        Raises `ConfigError` if the adapter is more than LoRA on linears, `CheckpointError` if files are missing or
        damaged.
        """
        self.folder, self.key, self.lora = folder, key, lora
        missing = [name for name in (CONFIG, TENSORS) if not (folder / name).is_file()]
        if missing:
            raise CheckpointError(f"{key}.path {folder} lacks {' and '.join(missing)}; it must be a PEFT adapter")
        self._config = _read_config(folder / CONFIG)
        stored = list(TensorFile(folder / TENSORS).entries)
        translate = translation([name.removeprefix(PREFIX) for name in stored], mark="layers.")
        self._stored = {translate(name.removeprefix(PREFIX)): name for name in stored}
        if len(self._stored) < len(stored):
            raise CheckpointError(f"{key}.path {folder}: {TENSORS} holds tensors under two names at once")
        self._tensors = safe_open(folder / TENSORS, framework="pt")
        _check_method(self._config, self._stored, f"{key}.path {folder}")

    @property
    def names(self) -> Collection[str]:
        """Names of its tensors, as a checkpoint has them."""
        return self._stored.keys()

    def read(self, name: str, index: Index, shape: tuple[int, ...]) -> Tensor | None:
        """The slice `index` of `name`; None where the adapter lacks it.

        Raises `ConfigError` where the linear has another rank or scale than the run expects, `CheckpointError` for
        another shape.
        """
        if name not in self._stored:
            return None
        self._check_scale(name)
        stored = self._tensors.get_slice(self._stored[name])
        if tuple(stored.get_shape()) != shape:
            raise CheckpointError(
                f"{self.key}.path {self.folder}: {name} is {stored.get_shape()} where the model has {list(shape)}"
            )
        return stored[index]

    def check_all_read(self, names: Collection[str]) -> None:
        """Raise `ConfigError` if the adapter has tensors beside `names`, those that all modules together read of it."""
        left = sorted(self._stored.keys() - set(names))
        if not left:
            return
        linears = adapted_linears(left)
        what = f"{len(linears)} linears, such as {linears[0]!r}" if linears else f"{left[0]!r}, which is no linear's"
        raise ConfigError(
            f"{self.key}.path {self.folder} also adapts {what}, that no pattern of {self.key}.targets matches: its "
            f"part of the adapter would be lost ({len(left)} tensors). Add a pattern, name the same path for the other "
            "module that it adapts, or, for experts and embeddings, merge it into the model with PEFT"
        )

    def _check_scale(self, name: str) -> None:
        """Compare rank and scale of a linear, by PEFT's rules for patterns, with the configuration."""
        linear = self._stored[name].removeprefix(PREFIX).removesuffix(A).removesuffix(B)
        rank = _by_pattern(self._config.get("rank_pattern"), linear, self._config["r"])
        alpha = _by_pattern(self._config.get("alpha_pattern"), linear, self._config["lora_alpha"])
        scale = alpha / (math.sqrt(rank) if self._config.get("use_rslora") else rank)
        if rank != self.lora.rank or not math.isclose(scale, self.lora.scale):
            raise ConfigError(
                f"{self.key}.path {self.folder} has r {rank} and a scale of {scale:g} for {linear}, but {self.key} "
                f"asks for rank {self.lora.rank} and a scale of {self.lora.scale:g}: set rank and alpha to the "
                "adapter's; one that differs between linears of a module is merged into the model with PEFT"
            )


def _by_pattern(patterns: Mapping[str, float] | None, linear: str, otherwise: float) -> float:
    """The value of the first pattern that matches the end of a linear's name, as in PEFT's `get_pattern_key`."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", linear):
            return value
    return otherwise


def _read_config(path: Path) -> dict[str, Any]:
    """`adapter_config.json`. Raises `CheckpointError` where it is damaged."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        numbers = [config["r"], config["lora_alpha"]]
        numbers += [value for key in ("rank_pattern", "alpha_pattern") for value in (config.get(key) or {}).values()]
        for pattern in [*(config.get("rank_pattern") or {}), *(config.get("alpha_pattern") or {})]:
            re.compile(pattern)
        if not all(isinstance(number, int | float) and number > 0 for number in numbers):
            raise ValueError(f"ranks and alphas must be positive numbers, not {numbers}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, re.error) as error:
        raise CheckpointError(f"{path} is no usable configuration of a LoRA adapter: {error!r}") from error
    return dict(config)


def _check_method(config: Mapping[str, Any], names: Collection[str], what: str) -> None:
    """Raise `ConfigError` if a PEFT adapter is more than A and B of linears."""
    problems = [
        f"{key} {value!r}" for key, value in sorted(config.items()) if key not in FREE_KEYS and value not in UNSET
    ]
    if config.get("peft_type") != "LORA":
        problems.append(f"peft_type {config.get('peft_type')!r}")
    start = str(config.get("init_lora_weights")).lower()
    if start.startswith(BASE_CHANGING):
        problems.append(f"init_lora_weights {start!r}, which also changes the weights beside the adapter")
    if other := sorted(name for name in names if not name.endswith((A, B))):
        problems.append(f"{len(other)} tensors that are no linear's A or B, such as {other[0]}")
    if problems:
        raise ConfigError(
            f"{what}: {'; '.join(problems)} is not supported: only LoRA on linears is used. Merge the adapter into the "
            "model with PEFT (`merge_and_unload`) and train from the result"
        )

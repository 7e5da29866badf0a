"""Compares what a checkpoint trained with what a run that starts from it trains: adapters, ranks, frozen parts."""

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from mimo_gemma4.checkpoint.files import CheckpointFiles, read_marker
from mimo_gemma4.distributed.collective_errors import all_ranks_or_raise
from mimo_gemma4.errors import CheckpointError, ConfigError
from mimo_gemma4.optim.module_optimizer import ModuleOptimizer
from mimo_gemma4.weights.lora_files import A, B

SHOWN = 4
"""Names of each kind in an error message."""


@dataclass(frozen=True)
class TrainedParts:
    """What one module trains, by Hugging Face names."""

    ranks: dict[str, int] = field(default_factory=dict)
    """By adapted linear, the rank of its adapter."""
    weights: set[str] = field(default_factory=set)
    """Trained tensors beside adapters."""


def recorded_state(path: Path) -> dict[str, Any]:
    """The trainer state of a checkpoint; empty where the checkpoint is damaged, which `save_load.load` reports."""
    marker = read_marker(path)
    return {} if isinstance(marker, str) else marker["trainer"]


def recorded_parts(path: Path) -> dict[str, TrainedParts]:
    """What a checkpoint trained, by module; empty for a damaged or converted one."""
    marker = read_marker(path)
    if isinstance(marker, str) or marker.get("weights_only"):
        return {}
    try:
        contents = CheckpointFiles(path, marker["files"])
    except CheckpointError:  # `save_load.load` reports it
        return {}
    parts: dict[str, TrainedParts] = {}
    for kind in ("weight", "exp_avg"):
        for name, key in contents.keys(kind).items():
            own = parts.setdefault(key.partition(".")[0], TrainedParts())
            if name.endswith(A):
                own.ranks[name.removesuffix(A)] = contents.shapes[key][0]
            elif kind == "exp_avg" and not name.endswith(B):
                own.weights.add(name)
    return parts


def configured_parts(optimizers: Mapping[str, ModuleOptimizer], host: dist.ProcessGroup) -> dict[str, TrainedParts]:
    """What this run trains, by module, over all ranks. Collective."""
    mine: dict[str, TrainedParts] = {}
    for module, optimizer in optimizers.items():
        own = mine.setdefault(module, TrainedParts())
        for binding in optimizer.bindings:
            if binding.name.endswith(A):
                own.ranks[binding.name.removesuffix(A)] = binding.shape[0]
            elif isinstance(binding.tensor, nn.Parameter) and binding.tensor.requires_grad:
                own.weights.add(binding.name)
    everyone: list[dict[str, TrainedParts]] = [{}] * host.size()
    dist.all_gather_object(everyone, mine, group=host)
    merged: dict[str, TrainedParts] = {}
    for held in everyone:
        for module, own in held.items():
            target = merged.setdefault(module, TrainedParts())
            target.ranks.update(own.ranks)
            target.weights.update(name for name in own.weights if not name.endswith(B))
    return merged


def check_recorded_parts(
    path: Path,
    optimizers: Mapping[str, ModuleOptimizer],
    scales: Mapping[str, float],
    host: dist.ProcessGroup,
    *,
    weights_only: bool,
) -> None:
    """Raise one `ConfigError`, on every rank, that names what a checkpoint trained and this run would drop or change.

    Starting with fresh optimizers, other weights may be frozen, and modules without adapters may get some.

    Args:
        path: the checkpoint.
        optimizers: those of this rank's modules.
        scales: by module with adapters, their scale in this run.
        host: gloo group over all ranks.
        weights_only: the run starts from the weights with fresh optimizers, `checkpoint.init_from`.
    """
    configured = configured_parts(optimizers, host)

    def check() -> None:
        if host.rank() != 0:
            return
        recorded, before = recorded_parts(path), recorded_state(path).get("lora", {})
        problems: list[str] = []
        for module, own in configured.items():
            past = recorded.get(module, TrainedParts())
            if past.ranks or not weights_only:
                if before.get(module) != scales.get(module):
                    problems.append(
                        f"the adapters of {module} in {path} have the scale {before.get(module)}, but modules.{module}"
                        f".lora asks for {scales.get(module)} (None: no adapters)"
                    )
                problems += _adapter_differences(f"modules.{module}.lora", past.ranks, own.ranks)
            if recorded and not weights_only:
                problems += _differences(f"modules.{module}.freeze", "trained", past.weights, own.weights)
        if not weights_only:
            trained = (module for module, past in recorded.items() if past.ranks or past.weights)
            problems += [f"`layout` lacks {module}, which it trained" for module in set(trained) - set(configured)]
        if problems:
            key = "checkpoint.init_from" if weights_only else "checkpoint.resume"
            raise ConfigError(
                f"{key}: {path} does not hold what this run trains: {'; '.join(problems)}. Set these keys as they were "
                "then, or export the run merged (python -m mimo_gemma4.convert to-hf) and start from that"
            )

    all_ranks_or_raise(host, check)


def _adapter_differences(key: str, past: Mapping[str, int], now: Mapping[str, int]) -> Iterable[str]:
    yield from _differences(f"{key}.targets", "adapted", set(past), set(now))
    if other := sorted(linear for linear in past.keys() & now.keys() if past[linear] != now[linear]):
        yield f"{key}.rank is {now[other[0]]}, and {past[other[0]]} there, of {_some(other)}"


def _differences(key: str, done: str, past: Set[str], now: Set[str]) -> Iterable[str]:
    for names, place, other in ((past - now, "there", "here"), (now - past, "here", "there")):
        if names:
            yield f"{key}: {_some(names)} {done} {place} but not {other}"


def _some(names: Iterable[str]) -> str:
    ordered = sorted(names)
    more = f" and {len(ordered) - SHOWN} more" if len(ordered) > SHOWN else ""
    return ", ".join(ordered[:SHOWN]) + more

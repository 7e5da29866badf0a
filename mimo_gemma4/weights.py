"""How every parameter region of a module corresponds to a slice of a Hugging Face tensor.

A module lists its `Binding`s once; loading, random initialisation, export, layout-free checkpoints and the gradient
parity tests all walk that one list, so no other code knows how a weight is fused or cut over tensor parallel ranks.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import nn

from mimo_gemma4.errors import CheckpointError

Index = tuple[slice, ...]
Init = Literal["normal", "ones", "zeros", "keep"]


@dataclass(frozen=True)
class Binding:
    """One rectangular region of a local tensor and the slice of the Hugging Face tensor that it holds."""

    name: str
    """Hugging Face name, for example `model.language_model.layers.0.self_attn.q_proj.weight`."""
    shape: tuple[int, ...]
    """Shape of the whole Hugging Face tensor."""
    index: Index
    """The slice of the Hugging Face tensor that this rank holds: one bounded, step-free slice per dimension."""
    tensor: torch.Tensor
    """The local parameter or buffer."""
    region: Index
    """Where in the local tensor that slice lies."""
    init: Init = "normal"
    """Initial value without a checkpoint: normal(0, `std`), ones, zeros, or keep what the module's constructor set."""
    std: float = 0.02

    def view(self, like: torch.Tensor | None = None) -> torch.Tensor:
        """The region of the local tensor, or of `like`, a tensor of the same shape (a gradient, say)."""
        return (self.tensor if like is None else like)[self.region]


class BoundModule(Protocol):
    """What a module of the layout offers beside being an `nn.Module`."""

    config: Any
    """megatron-core's `TransformerConfig`."""

    def bindings(self) -> list[Binding]:
        """What this rank holds of each Hugging Face tensor."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """As in `nn.Module`."""
        ...

    def train(self, mode: bool = True) -> Any:
        """As in `nn.Module`."""
        ...

    def eval(self) -> Any:
        """As in `nn.Module`."""
        ...


class TensorSource(Protocol):
    """Where weights come from, by Hugging Face name."""

    def read(self, name: str, index: Index, shape: tuple[int, ...]) -> torch.Tensor | None:
        """The slice `index` of tensor `name` of full `shape`, or None where the source lacks it."""
        ...


class RandomSource:
    """Initial weights that depend on the seed and the name only, never on the layout."""

    def __init__(self, seed: int):
        """Remember the run's seed."""
        self.seed = seed

    def normal(self, binding: Binding) -> torch.Tensor:
        """The binding's slice of a normal(0, std) tensor drawn for the whole Hugging Face tensor."""
        digest = hashlib.sha256(f"{self.seed}/{binding.name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        full = torch.empty(binding.shape, dtype=torch.float32).normal_(0.0, binding.std, generator=generator)
        return full[binding.index]


@torch.no_grad()
def initialise(bindings: Iterable[Binding], seed: int) -> None:
    """Fill every bound region with its initial value; equal for every layout."""
    source = RandomSource(seed)
    for binding in bindings:
        target = binding.view()
        if binding.init == "normal":
            target.copy_(source.normal(binding))
        elif binding.init == "ones":
            target.fill_(1.0)
        elif binding.init == "zeros":
            target.zero_()


@torch.no_grad()
def load(bindings: Iterable[Binding], source: TensorSource, origin: str) -> None:
    """Copy every bound region from `source`. Raises one `CheckpointError` that lists all tensors that are missing."""
    missing = []
    for binding in bindings:
        value = source.read(binding.name, binding.index, binding.shape)
        if value is None:
            missing.append(f"{binding.name} {list(binding.shape)}")
        else:
            binding.view().copy_(value)
    if missing:
        raise CheckpointError(f"{origin} lacks {len(missing)} tensors of the model: " + "; ".join(sorted(set(missing))))

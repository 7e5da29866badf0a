"""How every parameter region of a module corresponds to a slice of a Hugging Face tensor.

A module lists its `Binding`s once; loading, random initialisation, export, layout-free checkpoints and the gradient
parity tests all walk that one list, so no other code knows how a weight is fused or cut over tensor parallel ranks.
"""

import hashlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import nn

from mimo_gemma4.errors import CheckpointError

Index = tuple[slice, ...]
DECODERS = "decoders."
"""What the names of decoders' tensors start with; those of all other modules are Hugging Face's."""


@dataclass(frozen=True)
class Normal:
    """Initial values drawn from a normal distribution around 0."""

    std: float = 0.02


@dataclass(frozen=True)
class Uniform:
    """Initial values drawn uniformly from [-bound, bound]."""

    bound: float


@dataclass(frozen=True)
class Constant:
    """Initial values that are all equal."""

    value: float


ONES = Constant(1.0)
Initial = Normal | Uniform | Constant | None
"""What a region holds without a checkpoint; None keeps what the module's constructor set."""


def branch_norm(layers: int) -> Constant:
    """First weight of the norm behind a residual branch: the sum of two branches a layer starts with unit variance.

    With ones, as transformers has it, a fresh model adds so much noise to the embeddings that it learns far slower.
    """
    return Constant((2 * layers) ** -0.5)


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
    initial: Initial = Normal()
    """Its values without a checkpoint."""

    def view(self, like: torch.Tensor | None = None) -> torch.Tensor:
        """The region of the local tensor, or of `like`, a tensor of the same shape (a gradient, say)."""
        return (self.tensor if like is None else like)[self.region]


def whole(shape: Sequence[int]) -> Index:
    """The index of everything in a tensor of this shape."""
    return tuple(slice(0, size) for size in shape)


def bind_replicated(name: str, tensor: torch.Tensor, initial: Initial = Normal()) -> Binding:  # noqa: B008 - frozen
    """A tensor that every rank holds whole."""
    index = whole(tensor.shape)
    return Binding(name, tuple(tensor.shape), index, tensor, index, initial)


def bind_sharded(
    name: str,
    tensor: torch.Tensor,
    dim: int,
    group: dist.ProcessGroup | None,
    initial: Initial = Normal(),  # noqa: B008 - frozen
    *,
    at: slice | None = None,
) -> Binding:
    """A tensor of which the ranks of `group` hold equal, contiguous parts along `dim`; None: every rank holds it whole.

    This rank's part is all of the local `tensor`, or its slice `at` along `dim`, where several weights share a tensor.
    """
    region = list(whole(tensor.shape))
    region[dim] = region[dim] if at is None else at
    part = region[dim].stop - region[dim].start
    rank, ranks = (0, 1) if group is None else (group.rank(), group.size())
    index, shape = list(whole(tensor.shape)), list(tensor.shape)
    index[dim] = slice(part * rank, part * (rank + 1))
    shape[dim] = part * ranks
    return Binding(name, tuple(shape), tuple(index), tensor, tuple(region), initial)


def part_of(binding: Binding, dim: int, start: int, size: int) -> Binding:
    """`binding`, made for a whole tensor, as one of the part from `start` of `size` elements along `dim`."""
    index, shape = list(binding.index), list(binding.shape)
    index[dim] = slice(start, start + shape[dim])
    shape[dim] = size
    return replace(binding, index=tuple(index), shape=tuple(shape))


def share_between_stages(parameter: nn.Parameter, group: Literal["embd", "pp"]) -> None:
    """Mark a parameter that several pipeline stages hold a copy of.

    Its gradient is the sum over the stages of the process group: `embd` the first and the last, `pp` all. The second
    mark is megatron-core's and gives it a bucket of its own, so that the stages' shards hold the same elements.
    """
    parameter.stage_group = group  # type: ignore[attr-defined]
    parameter.shared_embedding = True  # type: ignore[attr-defined]


class BoundModule(Protocol):
    """What a module of the layout offers beside being an `nn.Module`."""

    config: Any
    """megatron-core's `TransformerConfig`."""

    def bindings(self) -> list[Binding]:
        """What this rank holds of each Hugging Face tensor."""
        ...

    def unused_tensors(self) -> Collection[str]:
        """Names of tensors that Hugging Face files may hold beside the bound ones, and that the model does not use."""
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


@torch.no_grad()
def initialise(bindings: Iterable[Binding], seed: int) -> None:
    """Fill every bound region with its initial values, which depend on seed and name only: equal for every layout."""
    for binding in bindings:
        if isinstance(binding.initial, Normal | Uniform):
            binding.view().copy_(_draw(binding, binding.initial, seed))
        elif isinstance(binding.initial, Constant):
            binding.view().fill_(binding.initial.value)


def _draw(binding: Binding, initial: Normal | Uniform, seed: int) -> torch.Tensor:
    """The binding's slice of what is drawn for the whole Hugging Face tensor."""
    digest = hashlib.sha256(f"{seed}/{binding.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    full = torch.empty(binding.shape, dtype=torch.float32)
    if isinstance(initial, Normal):
        full.normal_(0.0, initial.std, generator=generator)
    else:
        full.uniform_(-initial.bound, initial.bound, generator=generator)
    return full[binding.index]


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

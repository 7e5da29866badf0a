"""Maps every region of a module's parameters to a slice of a Hugging Face tensor.

A module lists its `Binding`s once. Loading, random initialisation, export, layout-free checkpoints, sums of gradients
and the gradient parity tests all use that list, so no other code knows how a weight is fused or cut over ranks.
"""

import hashlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, get_args

import torch
import torch.distributed as dist
from torch import nn

from mimo_gemma4.errors import CheckpointError

Index = tuple[slice, ...]
DECODERS = "decoders."
"""Prefix of the names of decoders' tensors; all other names are Hugging Face's."""


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
"""Initial values of a region without a checkpoint; None keeps the values that the module's constructor set."""


def residual_norm_init(layers: int) -> Constant:
    """Initial weight of the norm at the end of a residual branch, of which each of `layers` layers has two.

    The sum of all branches then starts with unit variance. With ones, as in transformers, a fresh model adds so much
    noise to the embeddings that it learns far slower.
    """
    return Constant((2 * layers) ** -0.5)


def qk_norm_init(head_dim: int) -> Constant:
    """Initial weight of the norms of queries and keys: scores of random heads start with unit variance.

    Gemma 4 does not divide scores by sqrt(head_dim).
    """
    return Constant(head_dim**-0.25)


GradientSum = Literal["tp", "embd", "pp"]
"""A process group whose ranks each compute a part of a tensor's gradient; `ModuleOptimizer` adds the parts up.

| group | every one of its ranks holds the whole tensor, and |
|---|---|
| `tp` | applies it to a part of the tokens or heads: tensor-parallel ranks |
| `embd` | uses it as input embedding or as output head: the first and the last pipeline stage |
| `pp` | uses it in the layers of its own pipeline stage: all pipeline stages |
"""
Replicas = Literal["dp_cp", "expt_dp"]
"""The process group over whose ranks ZeRO-1 sums a tensor's gradient and shards its optimizer state.

`dp_cp`, the data-parallel and context-parallel ranks, for everything but experts. `expt_dp`, the ranks that hold the
same experts, for these; it contains tensor-parallel ranks too.
"""


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
    """The place of that slice in the local tensor."""
    initial: Initial = Normal()
    """Its values without a checkpoint."""
    gradient_sum: tuple[GradientSum, ...] = ()
    """Groups over which the tensor's gradient is summed after backward, beside `replicas`. Without `tp`, the gradient
    of a tensor that tensor-parallel ranks hold whole must come out equal on them. All bindings of a tensor agree."""
    replicas: Replicas = "dp_cp"
    """Group that holds copies of the tensor and shares out its optimizer state. All bindings of a tensor agree."""

    def __post_init__(self) -> None:
        """Check the names of groups. Raises `ValueError`."""
        sums = set(self.gradient_sum)
        if not sums <= set(get_args(GradientSum)) or self.replicas not in get_args(Replicas):
            raise ValueError(
                f"{self.name}: gradient_sum={self.gradient_sum!r}, replicas={self.replicas!r}; "
                f"known are {get_args(GradientSum)} and {get_args(Replicas)}"
            )
        if sums >= {"embd", "pp"}:
            raise ValueError(f"{self.name}: gradient_sum={self.gradient_sum!r}, but `pp` includes the ranks of `embd`")

    def view(self, like: torch.Tensor | None = None) -> torch.Tensor:
        """The region of the local tensor, or of `like`, a tensor of the same shape such as its gradient."""
        return (self.tensor if like is None else like)[self.region]


def whole(shape: Sequence[int]) -> Index:
    """The index of everything in a tensor of this shape."""
    return tuple(slice(0, size) for size in shape)


def bind_replicated(
    name: str,
    tensor: torch.Tensor,
    initial: Initial = Normal(),  # noqa: B008 - frozen
    *,
    gradient_sum: tuple[GradientSum, ...] = (),
) -> Binding:
    """A tensor that every rank holds whole."""
    index = whole(tensor.shape)
    return Binding(name, tuple(tensor.shape), index, tensor, index, initial, gradient_sum)


def bind_sharded(
    name: str,
    tensor: torch.Tensor,
    dim: int,
    group: dist.ProcessGroup | None,
    initial: Initial = Normal(),  # noqa: B008 - frozen
    *,
    at: slice | None = None,
    gradient_sum: tuple[GradientSum, ...] = (),
    replicas: Replicas = "dp_cp",
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
    return Binding(name, tuple(shape), tuple(index), tensor, tuple(region), initial, gradient_sum, replicas)


def part_of(binding: Binding, dim: int, start: int, size: int) -> Binding:
    """`binding`, made for a part of a tensor as if it were whole, with the part's `start` and the tensor's `size`."""
    index, shape = list(binding.index), list(binding.shape)
    index[dim] = slice(start, start + shape[dim])
    shape[dim] = size
    return replace(binding, index=tuple(index), shape=tuple(shape))


class BoundModule(Protocol):
    """Methods and attributes of a module of the layout, beside those of `nn.Module`."""

    config: Any
    """megatron-core's `TransformerConfig`."""

    def bindings(self) -> list[Binding]:
        """This rank's slices of Hugging Face tensors."""
        ...

    def unused_tensors(self) -> Collection[str]:
        """Names of tensors that Hugging Face files may hold beside the bound ones; the model does not use them."""
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
    """A source of weights by Hugging Face name."""

    def read(self, name: str, index: Index, shape: tuple[int, ...]) -> torch.Tensor | None:
        """The slice `index` of tensor `name` of full `shape`, or None where the source lacks it."""
        ...


@torch.no_grad()
def initialise(bindings: Iterable[Binding], seed: int) -> None:
    """Fill every bound region with initial values, which depend only on seed and name: all layouts get the same."""
    for binding in bindings:
        if isinstance(binding.initial, Normal | Uniform):
            binding.view().copy_(_draw(binding, binding.initial, seed))
        elif isinstance(binding.initial, Constant):
            binding.view().fill_(binding.initial.value)


def _draw(binding: Binding, initial: Normal | Uniform, seed: int) -> torch.Tensor:
    """The binding's slice of random values for the whole Hugging Face tensor."""
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

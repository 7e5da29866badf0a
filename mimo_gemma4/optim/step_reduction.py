"""The results of a step over all ranks of all grids: token count, loss, gradient norm and clipping, finite or not.

One fp64 all-reduce (SUM) carries everything; the results stay on the device, so the step needs no host sync. Losses and
gradients are sums up to here, and every module divides by the same global token count, whatever its data-parallel size.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from mimo_gemma4.distributed.layout import Layout
from mimo_gemma4.optim.gradient_clipping import clip_coefficient


class HasSquareNorm(Protocol):
    """A module's share of the gradient norm (`optim.module_optimizer.ModuleOptimizer`)."""

    def square_norm(self) -> Tensor:
        """fp64 scalar on the device, to be summed over all ranks."""
        ...


class ModuleUsage(NamedTuple):
    """How a module spends a step, on one rank or summed over ranks."""

    busy: float
    """Seconds computing."""
    wait: float
    """Seconds waiting for what other ranks send."""
    flops: float
    """Floating point operations."""


@dataclass(frozen=True)
class RankUsage:
    """How one rank spends a step."""

    modules: Tensor
    """fp64 [modules, `ModuleUsage`] on the device, in the layout's order; zero where the rank does not hold one."""
    memory_gib: float
    """Largest device memory in use so far, in GiB; on the CPU, of the process."""


@dataclass(frozen=True)
class StepResults:
    """The global results of one step, equal on every rank: fp64 on the device, scalars unless a shape is given."""

    loss: Tensor
    """Mean loss per loss token in nats; 0 in a step without loss tokens."""
    decoder_losses: Tensor
    """[decoders]: loss of each decoder, summed over its soft tokens, in the layout's order."""
    loss_tokens: Tensor
    """N: labels that are not -100."""
    tokens: Tensor
    """Positions, padding excluded."""
    grad_norm: Tensor
    """Norm of the loss's gradient over all modules, before clipping. The loss is the sum over all loss tokens, plus the
    decoders' losses by their weights, over N."""
    module_grad_norm: Tensor
    """[modules]: the same per module, in the layout's order."""
    gradient_divisor: Tensor
    """What gradient sums are divided by: max(N, 1) / clip coefficient."""
    nonfinite: Tensor
    """1 where the loss or some gradient is not finite, else 0."""
    nonfinite_ranks: Tensor
    """[modules]: ranks of each module whose gradients are not finite."""
    hash_difference: Tensor
    """[language lanes]: 0 where encoders encoded exactly the items that the lane expects."""
    usage: Tensor
    """[modules, `ModuleUsage`]: sums over all ranks."""
    memory_gib: Tensor
    """[ranks]: memory of each rank."""


class StepReduction:
    """The fused reduction of a step over all ranks."""

    def __init__(self, layout: Layout, clip_grad: float | None, device: torch.device):
        """Fix the parts of the reduced vector, the same on all ranks.

        Args:
            layout: gives the modules, the language lanes, and which rank contributes what.
            clip_grad: largest gradient norm; null: no clipping.
            device: where the vector lives.
        """
        self.modules, self.decoders = tuple(layout.grids), layout.decoders
        self.clip_grad = clip_grad
        self.device = device
        self.rank = dist.get_rank()
        self.sizes = _part_sizes(layout)
        self.reports_loss = self.reports_tokens = False
        if self.rank in layout.language:
            at = layout.language.coordinate(self.rank)
            self.reports_loss = at.tp == 0 and at.pp == layout.language.pp - 1
            self.reports_tokens = (at.tp, at.cp, at.pp) == (0, 0, 0)
        grids = ((name, layout.grids[name]) for name in self.decoders)
        self.reports_decoder_loss = {n for n, grid in grids if self.rank in grid and grid.coordinate(self.rank).tp == 0}

    def reduce(
        self,
        optimizers: Mapping[str, HasSquareNorm],
        loss_sum: Tensor | float = 0.0,
        loss_tokens: Tensor | float = 0.0,
        tokens: Tensor | float = 0.0,
        hash_difference: Tensor | None = None,
        usage: RankUsage | None = None,
        decoder_losses: Mapping[str, Tensor] | None = None,
    ) -> StepResults:
        """Sum the contributions of all ranks. Collective over all ranks; no host sync.

        Every rank may pass its counts: of the ranks that hold the same tokens, only the first contributes them.

        Args:
            optimizers: this rank's modules by name, after `finish_gradients`. Empty when evaluating.
            loss_sum: summed token loss of the (dp, cp) shard that this language rank holds.
            loss_tokens: labels of that shard that are not -100.
            tokens: positions of this rank's whole language lane, padding excluded.
            hash_difference: [language lanes] on the device, see `sample_hash`.
            usage: how this rank spent a step.
            decoder_losses: by decoder that this rank holds, the summed loss of its lane.
        """
        vector = torch.zeros(sum(self.sizes.values()), dtype=torch.float64, device=self.device)
        parts = self._parts(vector)
        if self.reports_loss:
            parts["loss_sum"][0], parts["loss_tokens"][0] = loss_sum, loss_tokens
        if self.reports_tokens:
            parts["tokens"].fill_(tokens)
        for position, name in enumerate(self.modules):
            if name in optimizers:
                square = optimizers[name].square_norm()
                parts["square_norms"][position] = square
                parts["nonfinite_ranks"][position] = ~square.isfinite()
        if hash_difference is not None:
            parts["hash_difference"].copy_(hash_difference)
        if usage is not None:
            parts["usage"].copy_(usage.modules.flatten())
            parts["memory_gib"][self.rank : self.rank + 1].fill_(usage.memory_gib)
        for position, name in enumerate(self.decoders):
            if decoder_losses is not None and name in self.reports_decoder_loss:
                parts["decoder_losses"][position] = decoder_losses[name]
        dist.all_reduce(vector)
        return self._results(self._parts(vector))

    def _parts(self, vector: Tensor) -> dict[str, Tensor]:
        """Views of the vector's parts, by name."""
        return dict(zip(self.sizes, vector.split(list(self.sizes.values())), strict=True))

    def _results(self, parts: Mapping[str, Tensor]) -> StepResults:
        """The results from the summed parts."""
        loss_sum, loss_tokens, squares = parts["loss_sum"][0], parts["loss_tokens"][0], parts["square_norms"]
        count = loss_tokens.clamp(min=1.0)
        norm = squares.sum().sqrt() / count
        finite = loss_sum.isfinite() & norm.isfinite() & parts["decoder_losses"].isfinite().all()
        return StepResults(
            loss=loss_sum / count,
            decoder_losses=parts["decoder_losses"],
            loss_tokens=loss_tokens,
            tokens=parts["tokens"][0],
            grad_norm=norm,
            module_grad_norm=squares.sqrt() / count,
            gradient_divisor=count / clip_coefficient(norm, self.clip_grad),
            nonfinite=(~finite).double(),
            nonfinite_ranks=parts["nonfinite_ranks"],
            hash_difference=parts["hash_difference"],
            usage=parts["usage"].view(len(self.modules), -1),
            memory_gib=parts["memory_gib"],
        )


def _part_sizes(layout: Layout) -> dict[str, int]:
    """The parts of the reduced vector, in its order: number of elements by name."""
    modules = len(layout.grids)
    return {
        "loss_sum": 1,
        "loss_tokens": 1,
        "tokens": 1,
        "square_norms": modules,
        "nonfinite_ranks": modules,
        "hash_difference": layout.language.dp,
        "usage": modules * len(ModuleUsage._fields),
        "memory_gib": layout.world_size,
        "decoder_losses": len(layout.decoders),
    }


class StepReport:
    """Step results on their way to the host: made when the step is enqueued, read when the device has finished it."""

    def __init__(self, results: StepResults):
        """Start the copy; it does not wait for the device."""
        tensors = {part.name: getattr(results, part.name) for part in fields(StepResults)}
        self._shapes = {name: tensor.shape for name, tensor in tensors.items()}
        packed = torch.cat([tensor.reshape(-1) for tensor in tensors.values()])
        self._finished = torch.cuda.Event() if packed.is_cuda else None
        self._host = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=packed.is_cuda)
        self._host.copy_(packed, non_blocking=True)
        if self._finished is not None:
            self._finished.record()

    def read(self) -> dict[str, Any]:
        """Every field of the results as a float or nested list of floats; waits until the copy is done."""
        if self._finished is not None:
            self._finished.synchronize()
        parts = self._host.split([shape.numel() for shape in self._shapes.values()])
        named = zip(self._shapes.items(), parts, strict=True)
        return {name: part.view(shape).tolist() for (name, shape), part in named}


def sample_hash(keys: Iterable[str]) -> float:
    """Sum of 32-bit hashes of media item keys: equal for equal multisets of keys, however they are split over ranks.

    An encoder lane adds this for the items that it encoded for a language lane, the language lane subtracts it for the
    items that it expects. Sums of up to 2^21 items are exact in fp64, in any order.
    """
    return float(sum(int.from_bytes(hashlib.blake2b(key.encode(), digest_size=4).digest()) for key in keys))

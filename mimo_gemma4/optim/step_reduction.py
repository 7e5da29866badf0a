"""What all ranks of all grids agree on once per step: token count, loss, gradient norm, finiteness, sample identity.

One fp64 all-reduce (SUM) carries everything; its results stay on the device, so the step needs no host sync. Losses and
gradients are sums up to here, and every module divides by the same global token count, whatever its data-parallel size.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from mimo_gemma4.distributed.layout import Layout

USAGE_COLUMNS = 3
"""Numbers that a rank tells about its use of each module."""


class HasSquareNorm(Protocol):
    """A module's share of the gradient norm (`optim.ModuleOptimizer`)."""

    def square_norm(self) -> Tensor:
        """fp64 scalar on the device, to be summed over all ranks."""
        ...


class Usage(Protocol):
    """What a rank tells about its use of the machine (`usage.Usage`)."""

    @property
    def modules(self) -> Tensor:
        """fp64 [modules, USAGE_COLUMNS], to be summed over all ranks."""
        ...

    @property
    def memory_gib(self) -> float:
        """Memory of this rank in GiB."""
        ...


@dataclass(frozen=True)
class StepResults:
    """The global results of one step, equal on every rank: fp64 on the device, scalars unless a shape is given."""

    loss: Tensor
    """Mean loss per loss token in nats; 0 in a step without loss tokens."""
    decoder_losses: Tensor
    """[decoders]: loss of each decoder, summed over its rows, in the layout's order."""
    loss_tokens: Tensor
    """N: labels that are not -100."""
    tokens: Tensor
    """Positions, padding excluded."""
    grad_norm: Tensor
    """Norm of the gradient of the loss over all modules, before clipping. The loss is the sum over all loss tokens, and
    of the decoders' by their weights, over N."""
    module_grad_norm: Tensor
    """[modules]: the same per module, in the layout's order."""
    divisor: Tensor
    """What gradient sums are divided by: max(N, 1) / clip coefficient."""
    nonfinite: Tensor
    """1 where the loss or some gradient is not finite, else 0."""
    nonfinite_ranks: Tensor
    """[modules]: ranks of each module whose gradients are not finite."""
    hash_difference: Tensor
    """[language lanes]: 0 where encoders encoded exactly the items that the lane expects."""
    usage: Tensor
    """[modules, USAGE_COLUMNS]: sums over all ranks."""
    memory_gib: Tensor
    """[ranks]: memory of each rank."""


class StepReduction:
    """The fused reduction of a step over all ranks."""

    def __init__(
        self, layout: Layout, clip_grad: float | None, device: torch.device, group: dist.ProcessGroup | None = None
    ):
        """Fix the vector's parts, alike on all ranks.

        Args:
            layout: gives the modules, the language lanes, and which rank tells what.
            clip_grad: largest gradient norm; null: no clipping.
            device: where the vector lives.
            group: all ranks; null: the default group.
        """
        self.modules, self.decoders = tuple(layout.grids), layout.decoders
        self.clip_grad = clip_grad
        self.device = device
        self.group = group
        self.rank = dist.get_rank(group)
        lanes, modules = layout.language.dp, len(self.modules)
        losses = len(self.decoders)
        self.sizes = [1, 1, 1, modules, modules, lanes, modules * USAGE_COLUMNS, layout.world_size, losses]
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
        usage: Usage | None = None,
        decoder_losses: Mapping[str, Tensor] | None = None,
    ) -> StepResults:
        """Sum this rank's contributions with all others'. Collective over all ranks; no host sync.

        Every rank may give its counts: one rank tells each shard of tokens, the first of its tensor parallel group.

        Args:
            optimizers: this rank's modules by name, after `finish_gradients`. Empty when evaluating.
            loss_sum: summed token loss of the (dp, cp) shard that this language rank holds.
            loss_tokens: labels of that shard that are not -100.
            tokens: positions of this rank's whole language lane, padding excluded.
            hash_difference: [language lanes] on the device, see `sample_hash`.
            usage: what this rank tells about its use of the machine.
            decoder_losses: by decoder that this rank holds, the summed loss of its lane.
        """
        vector = torch.zeros(sum(self.sizes), dtype=torch.float64, device=self.device)
        mine = vector.split(self.sizes)
        if self.reports_loss:
            mine[0][0], mine[1][0] = loss_sum, loss_tokens
        if self.reports_tokens:
            mine[2].fill_(tokens)
        for position, name in enumerate(self.modules):
            if name in optimizers:
                square = optimizers[name].square_norm()
                mine[3][position] = square
                mine[4][position] = ~square.isfinite()
        if hash_difference is not None:
            mine[5].copy_(hash_difference)
        if usage is not None:
            mine[6].copy_(usage.modules.flatten())
            mine[7][self.rank : self.rank + 1].fill_(usage.memory_gib)
        for position, name in enumerate(self.decoders):
            if decoder_losses is not None and name in self.reports_decoder_loss:
                mine[8][position] = decoder_losses[name]
        dist.all_reduce(vector, group=self.group)
        return self._results(vector)

    def _results(self, vector: Tensor) -> StepResults:
        loss_sum, loss_tokens, tokens, squares, nonfinite_ranks, hashes, usage, memory, losses = vector.split(
            self.sizes
        )
        count = loss_tokens[0].clamp(min=1.0)
        norm = squares.sum().sqrt() / count
        clip = torch.ones_like(norm) if self.clip_grad is None else (self.clip_grad / (norm + 1e-6)).clamp(max=1.0)
        return StepResults(
            loss=loss_sum[0] / count,
            decoder_losses=losses,
            loss_tokens=loss_tokens[0],
            tokens=tokens[0],
            grad_norm=norm,
            module_grad_norm=squares.sqrt() / count,
            divisor=count / clip,
            nonfinite=(~(loss_sum[0].isfinite() & norm.isfinite() & losses.isfinite().all())).double(),
            nonfinite_ranks=nonfinite_ranks,
            hash_difference=hashes,
            usage=usage.view(-1, USAGE_COLUMNS),
            memory_gib=memory,
        )


class StepReport:
    """An agreement on its way to the host: made when the step is enqueued, read when the device has finished it."""

    def __init__(self, agreement: StepResults):
        """Start the copy; it does not wait for the device."""
        tensors = {part.name: getattr(agreement, part.name) for part in fields(StepResults)}
        self._shapes = {name: tensor.shape for name, tensor in tensors.items()}
        packed = torch.cat([tensor.reshape(-1) for tensor in tensors.values()])
        self._finished = torch.cuda.Event() if packed.is_cuda else None
        self._host = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=packed.is_cuda)
        self._host.copy_(packed, non_blocking=True)
        if self._finished is not None:
            self._finished.record()

    def read(self) -> dict[str, Any]:
        """Every field of the agreement as a float or nested list of floats; waits until the copy is done."""
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

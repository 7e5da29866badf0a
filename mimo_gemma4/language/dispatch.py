"""Sends copies of tokens to the ranks that hold their experts, and the results back.

A token goes to K experts, so T tokens make T * K copies. They are sorted by expert, and so by rank, exchanged over the
expert-parallel group, and sorted by local expert. The way back undoes each step and adds up the K results of a token.
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import all_to_all
from torch.distributed import ProcessGroup


class Dispatch:
    """The dispatch of one microbatch's tokens to one layer's experts.

    The numbers of copies that each pair of ranks exchanges are computed on the device. Their copy to the host starts in
    the constructor, and only `dispatch` waits for it, so work that the caller enqueues in between hides the wait.
    """

    def __init__(self, chosen: torch.Tensor, num_experts: int, group: ProcessGroup) -> None:
        """Sort the copies and exchange their numbers with other ranks; collective over `group`.

        Args:
            chosen: [T, K] numbers of the experts that each of this rank's tokens goes to.
            num_experts: experts over all ranks; each rank of `group` holds equally many, in order.
            group: expert-parallel group.
        """
        self.group, self.copies = group, chosen.shape[1]
        flat = chosen.flatten()
        self.order = flat.argsort(stable=True)
        self.inverse = _inverse(self.order)
        sent = torch.zeros(num_experts, dtype=torch.int64, device=chosen.device)
        sent.scatter_add_(0, flat, torch.ones_like(flat))
        received = sent
        if group.size() > 1:
            received = torch.empty_like(sent)
            dist.all_to_all_single(received, sent, group=group)
        self.received = received.view(group.size(), -1)
        self.ends = self.received.sum(0).cumsum(0, dtype=torch.int32)
        """[experts (local)] int32: where the token copies of each local expert end."""
        self._counts = _HostCopy(torch.stack((sent.view_as(self.received), self.received)))

    def dispatch(self, tokens: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Token copies [N (local), H] for this rank's experts, sorted by expert, and their weights [N (local)].

        `tokens` [T, H], `weights` [T, K]; N is the number of copies that the ranks' routers send here.
        """
        copies = _Spread.apply(tokens, self.order, self.inverse, self.copies)  # [T, H] → [T * K, H], by expert
        copy_weights = _Spread.apply(weights.flatten(), self.order, self.inverse, 1)  # [T * K]
        if self.group.size() == 1:
            return copies, copy_weights
        sent, received = self._counts.read()
        self._sent, self._received = [sum(part) for part in sent], [sum(part) for part in received]
        ranks, experts = self.received.shape
        of_expert = torch.arange(experts, device=tokens.device).repeat(ranks)
        of_expert = of_expert.repeat_interleave(self.received.flatten(), output_size=sum(self._received))
        self._by_expert = of_expert.argsort(stable=True)
        self._by_rank = _inverse(self._by_expert)
        return self._to_experts(copies), self._to_experts(copy_weights)

    def combine(self, results: torch.Tensor) -> torch.Tensor:
        """Sums [T, H] of each token's results; `results` [N (local), H] are in the order of what `dispatch` gave."""
        if self.group.size() > 1:
            results = _Spread.apply(results, self._by_rank, self._by_expert, 1)
            results = all_to_all(self.group, results, self._sent, self._received)  # [N (local), H] → [T * K, H]
        return _Collect.apply(results, self.order, self.inverse, self.copies)  # [T * K, H] → [T, H]

    def _to_experts(self, copies: torch.Tensor) -> torch.Tensor:
        arrived = all_to_all(self.group, copies, self._received, self._sent)  # [T * K, …] → [N (local), …], by rank
        return _Spread.apply(arrived, self._by_expert, self._by_rank, 1)  # by local expert

    def copies_by_expert(self) -> list[int]:
        """Token copies of each local expert, on the host; waits for the device if `dispatch` has not done so."""
        return [sum(of_ranks) for of_ranks in zip(*self._counts.read()[1], strict=True)]


class _HostCopy:
    """A small device tensor on its way to the host."""

    def __init__(self, tensor: torch.Tensor) -> None:
        """Start the copy."""
        self._finished = torch.cuda.Event() if tensor.is_cuda else None
        self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        self._host.copy_(tensor, non_blocking=True)
        if self._finished is not None:
            self._finished.record()

    def read(self) -> list[Any]:
        """Nested lists of the values, once the copy is done; waits for nothing that was enqueued after it."""
        if self._finished is not None:
            self._finished.synchronize()
        return self._host.tolist()


class _Spread(torch.autograd.Function):
    """From tokens [T, ...] to their copies [T * K, ...] in the order `order`; a permutation where K is 1.

    Its backward pass gathers instead of scattering sums, so it is deterministic and rounds once.
    """

    @staticmethod
    def forward(
        ctx: Any, tokens: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor, copies: int
    ) -> torch.Tensor:
        ctx.save_for_backward(order, inverse)
        ctx.copies = copies
        return _spread(tokens, order, copies)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        _, inverse = ctx.saved_tensors
        return _collect(gradients[0], inverse, ctx.copies), None, None, None


class _Collect(torch.autograd.Function):
    """The adjoint of `_Spread`: from copies [T * K, ...] in the order `order` to their sums [T, ...]."""

    @staticmethod
    def forward(
        ctx: Any, results: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor, copies: int
    ) -> torch.Tensor:
        ctx.save_for_backward(order, inverse)
        ctx.copies = copies
        return _collect(results, inverse, copies)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        order, _ = ctx.saved_tensors
        return _spread(gradients[0], order, ctx.copies), None, None, None


def _spread(tokens: torch.Tensor, order: torch.Tensor, copies: int) -> torch.Tensor:
    return tokens.index_select(0, order if copies == 1 else order // copies)


def _collect(results: torch.Tensor, inverse: torch.Tensor, copies: int) -> torch.Tensor:
    results = results.index_select(0, inverse)
    return results if copies == 1 else results.view(len(results) // copies, copies, *results.shape[1:]).sum(dim=1)


def _inverse(order: torch.Tensor) -> torch.Tensor:
    """The permutation that undoes `order`."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))

"""Summed cross entropy of softcapped logits over a tensor parallel vocabulary, a chunk of tokens at a time."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed import ProcessGroup

IGNORED = -100
LOGITS_AT_ONCE = 2**28
"""Logits of this rank that are held at a time (1 GiB in fp32): the number of tokens per chunk follows from it."""


def softcapped(logits: torch.Tensor, cap: float | None) -> torch.Tensor:
    """fp32 logits, squeezed into (-cap, cap) by cap * tanh(logits / cap)."""
    logits = logits.float()
    return logits if cap is None else torch.tanh(logits / cap) * cap


def summed_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    cap: float | None,
    tp_group: ProcessGroup,
    logits_at_once: int = LOGITS_AT_ONCE,
) -> torch.Tensor:
    """Sum over tokens with labels != -100 of the cross entropy of softcapped `hidden @ weight.T`, in nats, fp32 scalar.

    `hidden` [tokens, H] is equal on all tensor parallel ranks, `weight` is [vocabulary / tp (local), H], `labels`
    [tokens]. The result is equal on all ranks; the gradient of `hidden` is this rank's part, to be summed over them.
    """
    tokens = max(1, logits_at_once // weight.shape[0])
    with_gradient = torch.is_grad_enabled()
    return _SummedCrossEntropy.apply(hidden, weight, labels, cap, tp_group, tokens, with_gradient)


def most_likely(
    hidden: torch.Tensor, weight: torch.Tensor, tp_group: ProcessGroup, logits_at_once: int = LOGITS_AT_ONCE
) -> torch.Tensor:
    """Vocabulary ids [tokens] of the largest logits of `hidden @ weight.T`; the softcap keeps their order.

    `hidden` [tokens, H] is equal on all tensor parallel ranks, `weight` is [vocabulary / tp (local), H]. Of
    equal logits the lowest id wins, so the result is equal on all ranks.
    """
    vocabulary = weight.shape[0]
    ids = []
    for part in hidden.split(max(1, logits_at_once // vocabulary)):
        largest, index = F.linear(part, weight).float().max(dim=1)
        best = largest.clone()
        dist.all_reduce(best, op=dist.ReduceOp.MAX, group=tp_group)
        mine = index + tp_group.rank() * vocabulary
        mine = mine.masked_fill(largest < best, vocabulary * tp_group.size())
        dist.all_reduce(mine, op=dist.ReduceOp.MIN, group=tp_group)
        ids.append(mine)
    return torch.cat(ids)


class _SummedCrossEntropy(torch.autograd.Function):
    """The gradient is computed with the loss, chunk by chunk, so that logits are neither kept nor computed twice."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        cap: float | None,
        tp_group: ProcessGroup,
        tokens: int,
        with_gradient: bool,
    ) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        hidden_wanted, weight_wanted = (with_gradient and needed for needed in ctx.needs_input_grad[:2])
        hidden_gradient = torch.empty_like(hidden) if hidden_wanted else None
        weight_gradient = torch.zeros_like(weight, dtype=torch.float32) if weight_wanted else None
        for begin in range(0, hidden.shape[0], tokens):
            chunk = slice(begin, begin + tokens)
            loss, gradient = _chunk_loss(
                F.linear(hidden[chunk], weight), labels[chunk], cap, tp_group, hidden_wanted or weight_wanted
            )
            total += loss
            if gradient is None:
                continue
            if hidden_gradient is not None:
                torch.mm(gradient, weight, out=hidden_gradient[chunk])
            if weight_gradient is not None:
                weight_gradient += gradient.t() @ hidden[chunk]
        weight_gradient = weight_gradient.to(weight.dtype) if weight_gradient is not None else None
        ctx.save_for_backward(hidden_gradient, weight_gradient)
        return total

    @staticmethod
    def backward(ctx: Any, factor: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight = (None if saved is None else saved * factor.to(saved.dtype) for saved in ctx.saved_tensors)
        return hidden, weight, None, None, None, None, None


def _chunk_loss(
    logits: torch.Tensor, labels: torch.Tensor, cap: float | None, tp_group: ProcessGroup, with_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Summed loss of a chunk, and its gradient by `logits` [tokens, vocabulary / tp (local)] in their dtype."""
    vocabulary = logits.shape[1]
    scores = softcapped(logits, cap)
    rows = labels - tp_group.rank() * vocabulary
    elsewhere = (rows < 0) | (rows >= vocabulary)
    rows = rows.masked_fill(elsewhere, 0).unsqueeze(1)
    maximum = scores.amax(dim=1)
    dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=tp_group)
    shifted = scores - maximum.unsqueeze(1)
    target = shifted.gather(1, rows).squeeze(1).masked_fill(elsewhere, 0.0)
    exponentials = shifted.exp_()
    sums = torch.stack((target, exponentials.sum(dim=1)))
    dist.all_reduce(sums, group=tp_group)
    target, normaliser = sums.unbind()
    counted = (labels != IGNORED).float()
    loss = ((normaliser.log() - target) * counted).sum()
    if not with_gradient:
        return loss, None
    gradient = exponentials.mul_((counted / normaliser).unsqueeze(1))
    here = (counted * ~elsewhere).unsqueeze(1)
    gradient.scatter_(
        1, rows, gradient.gather(1, rows) - here
    )  # one entry per row, so unlike scatter_add deterministic
    if cap is not None:
        gradient.mul_(1 - (scores / cap).square())
    return loss, gradient.to(logits.dtype)

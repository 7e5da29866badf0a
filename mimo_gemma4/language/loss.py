"""Head and summed cross entropy over a tensor-parallel vocabulary, a block of words at a time.

Neither logits nor their gradients exist for the whole vocabulary at once: forward keeps two numbers per token, and
backward computes every block's logits again. This costs a third more time in the head's GEMMs and saves gigabytes.
"""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed import ProcessGroup

from mimo_gemma4.weights.main_gradients import add_product, main_gradient

IGNORED = -100
LOGITS_AT_ONCE = 2**26
"""Most logits of this rank in memory at a time (256 MiB in fp32); determines the words per block."""


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

    `hidden` [tokens, H] is equal on all tensor-parallel ranks, `weight` is [vocabulary / tp (local), H], `labels`
    [tokens]. The result is equal on all ranks; the gradient of `hidden` is this rank's part, to be summed over them.
    """
    words = _words_at_once(hidden.shape[0], logits_at_once)
    return _SummedCrossEntropy.apply(hidden, weight, labels, cap, tp_group, words)


def _words_at_once(tokens: int, logits_at_once: int) -> int:
    """Words of a block: a multiple of 256, or of a smaller power of two where fewer fit.

    Packs have odd lengths. Blocks as odd would give the logits an odd leading dimension, for which cuBLAS has only
    unaligned kernels, several times slower.
    """
    words = max(1, logits_at_once // max(1, tokens))
    return words - words % min(256, 1 << (words.bit_length() - 1))


def most_likely(
    hidden: torch.Tensor, weight: torch.Tensor, tp_group: ProcessGroup, logits_at_once: int = LOGITS_AT_ONCE
) -> torch.Tensor:
    """Vocabulary ids [tokens] of the largest logits of `hidden @ weight.T`; the softcap keeps their order.

    `hidden` [tokens, H] is equal on all tensor-parallel ranks, `weight` is [vocabulary / tp (local), H]. Of
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
    """Saves the log of each token's normaliser, so that backward computes every probability in one pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        cap: float | None,
        tp_group: ProcessGroup,
        words: int,
    ) -> torch.Tensor:
        statistics = _fused(_block_statistics, hidden.device.type)
        rows = labels - tp_group.rank() * weight.shape[0]  # [tokens], of the labels in this rank's weight
        maximum = torch.full_like(labels, -torch.inf, dtype=torch.float32)  # [tokens]
        total, target = torch.zeros_like(maximum), torch.zeros_like(maximum)
        for first, block in _blocks(weight, words):  # logits [tokens, words], never [tokens, vocabulary]
            maximum, total, target = statistics(F.linear(hidden, block), rows - first, maximum, total, target, cap)
        largest = maximum.clone()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=tp_group)
        sums = torch.stack((total * (maximum - largest).exp(), target))  # [2, tokens]
        dist.all_reduce(sums, group=tp_group)
        normaliser = largest + sums[0].log()  # log of the sum of exponentials
        ctx.save_for_backward(hidden, weight, rows, normaliser, labels)
        ctx.cap, ctx.words, ctx.buffer = cap, words, main_gradient(weight)
        return torch.where(labels == IGNORED, 0.0, normaliser - sums[1]).sum()

    @staticmethod
    def backward(ctx: Any, factor: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, rows, normaliser, labels = ctx.saved_tensors
        gradient_of = _fused(_block_gradient, hidden.device.type)
        factors = torch.where(labels == IGNORED, 0.0, factor)
        hidden_wanted, weight_wanted = ctx.needs_input_grad[:2]
        hidden_gradient = torch.zeros_like(hidden, dtype=torch.float32) if hidden_wanted else None
        weight_gradient = torch.empty_like(weight) if weight_wanted and ctx.buffer is None else None
        for first, block in _blocks(weight, ctx.words):
            # [tokens, words]
            gradient = gradient_of(F.linear(hidden, block), rows - first, normaliser, factors, ctx.cap)
            if hidden_gradient is not None:
                hidden_gradient += _product_in_fp32(gradient, block)
            if ctx.buffer is not None:
                add_product(ctx.buffer[first : first + len(block)], gradient, hidden)
            elif weight_gradient is not None:
                torch.mm(gradient.t(), hidden, out=weight_gradient[first : first + len(block)])
        if hidden_gradient is not None:
            hidden_gradient = hidden_gradient.to(hidden.dtype)
        return hidden_gradient, weight_gradient, None, None, None, None


def _blocks(weight: torch.Tensor, words: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Blocks of rows, each with the number of its first row."""
    for first in range(0, weight.shape[0], words):
        yield first, weight[first : first + words]


def _block_statistics(
    logits: torch.Tensor,
    rows: torch.Tensor,
    maximum: torch.Tensor,
    total: torch.Tensor,
    target: torch.Tensor,
    cap: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Running maximum, sum of exponentials relative to it, and score of the label, each [tokens], after one more block.

    `logits` are [tokens, words]; `rows` [tokens] are the labels, counted from the block's first word.
    """
    scores = softcapped(logits, cap)
    largest = torch.maximum(maximum, scores.amax(dim=1))
    total = total * (maximum - largest).exp() + (scores - largest.unsqueeze(1)).exp().sum(dim=1)
    inside = (rows >= 0) & (rows < logits.shape[1])
    found = scores.gather(1, rows.where(inside, 0).unsqueeze(1)).squeeze(1)
    return largest, total, target + torch.where(inside, found, 0.0)


def _block_gradient(
    logits: torch.Tensor, rows: torch.Tensor, normaliser: torch.Tensor, factors: torch.Tensor, cap: float | None
) -> torch.Tensor:
    """Gradient of `factors`-weighted cross entropy by one block's `logits` [tokens, words], in their dtype."""
    scores = softcapped(logits, cap)
    words = torch.arange(logits.shape[1], device=logits.device)
    gradient = (scores - normaliser.unsqueeze(1)).exp() - (words == rows.unsqueeze(1)).float()
    gradient = gradient * factors.unsqueeze(1)
    if cap is not None:
        gradient = gradient * (1 - (scores / cap).square())
    return gradient.to(logits.dtype)


@cache
def _fused(function: Callable[..., Any], device_type: str) -> Callable[..., Any]:
    """The function compiled to one kernel on CUDA; elsewhere the function itself."""
    return torch.compile(function, dynamic=True) if device_type == "cuda" else function


def _product_in_fp32(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """`left @ right` in fp32, without rounding the product's fp32 sums to half precision where the device can."""
    if left.is_cuda and left.dtype != torch.float32:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left @ right

"""Attention by torch's scaled-dot-product attention, a block of queries at a time: on any device, but slow."""

from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F

from mimo_gemma4.language.attention_context import VisibleKeys

QUERIES_PER_BLOCK = 256


class ReferencePlan:
    """The runs of keys that queries see, and the slice of the keys that each block of queries needs."""

    def __init__(self, keys: VisibleKeys) -> None:
        """Read the blocks' slices from the host copy of the runs."""
        self.runs = keys.runs
        self.blocks = [
            (slice(start, start + first.shape[1]), slice(int(first.min()), int(last.max()) + 1))
            for start, first, last in zip(
                range(0, keys.first.shape[1], QUERIES_PER_BLOCK),
                keys.first.split(QUERIES_PER_BLOCK, dim=1),
                keys.last.split(QUERIES_PER_BLOCK, dim=1),
                strict=True,
            )
        ]

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attend as `AttentionPlan` says."""
        if len(self.blocks) > 1:
            return _BlockwiseAttention.apply(query, key, value, self)
        ((_, keys),) = self.blocks
        return _attend(query, key[keys], value[keys], self._only_mask)

    def block(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, queries: slice, keys: slice) -> Any:
        """Result [queries, B, heads * D] for the slices `queries` and `keys`; the tensors hold only these slices."""
        return _attend(query, key, value, self._mask(queries, keys))

    def _mask(self, queries: slice, keys: slice) -> torch.Tensor:
        """Which of `keys` each of `queries` sees: bool [B, 1, queries, keys]."""
        numbers = torch.arange(keys.start, keys.stop, device=self.runs.device)
        first, last = self.runs[:, :, None, queries, None]
        return (numbers >= first) & (numbers <= last)

    @cached_property
    def _only_mask(self) -> torch.Tensor:
        """The mask of the only block, which all layers of the type share."""
        return self._mask(*self.blocks[0])


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    # Key/value heads are expanded here: with `enable_gqa`, torch 2.11 falls back to its O(S^2) kernel at D = 512.
    repeats = query.shape[2] // key.shape[2]
    key, value = (states.repeat_interleave(repeats, dim=2).permute(1, 2, 0, 3) for states in (key, value))
    attended = F.scaled_dot_product_attention(query.permute(1, 2, 0, 3), key, value, attn_mask=mask, scale=1.0)
    return attended.permute(2, 0, 1, 3).flatten(2)


class _BlockwiseAttention(torch.autograd.Function):
    """Keeps only its inputs; backward computes each block again, so that masks and scores exist for one at a time."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: ReferencePlan
    ) -> torch.Tensor:
        ctx.plan = plan
        ctx.save_for_backward(query, key, value)
        attended = [plan.block(query[own], key[keys], value[keys], own, keys) for own, keys in plan.blocks]
        return torch.cat(attended)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        query_gradients = []
        # Many blocks contribute to a key's gradient: summed in bf16, small contributions would be lost.
        precise = torch.promote_types(key.dtype, torch.float32)
        key_gradient, value_gradient = (torch.zeros_like(states, dtype=precise) for states in (key, value))
        for own, keys in ctx.plan.blocks:
            inputs = [states.detach().requires_grad_() for states in (query[own], key[keys], value[keys])]
            with torch.enable_grad():
                attended = ctx.plan.block(*inputs, own, keys)
            of_query, of_key, of_value = torch.autograd.grad(attended, inputs, gradients[0][own])
            query_gradients.append(of_query)
            key_gradient[keys] += of_key
            value_gradient[keys] += of_value
        return torch.cat(query_gradients), key_gradient.to(key.dtype), value_gradient.to(value.dtype), None

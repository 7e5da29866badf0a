"""Gradients that go straight into a parameter's fp32 buffer, without a copy in the parameter's own type.

megatron-core's data parallelism gives every trainable parameter the buffer `main_grad` and adds `grad` to it after
each backward pass. Where a function adds its part itself, it returns no gradient, and nothing is added twice.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def main_gradient(weight: Tensor) -> Tensor | None:
    """The fp32 buffer of a trainable parameter, None where it has none: without an optimizer, or frozen."""
    return getattr(weight, "main_grad", None) if weight.requires_grad else None


def add_product(buffer: Tensor, gradient: Tensor, inputs: Tensor) -> None:
    """Add `gradient.T @ inputs` to an fp32 buffer [out, in]; `gradient` is [n, out], `inputs` [n, in].

    On CUDA the sums of the product stay in fp32 and are added as they leave the matrix unit.
    """
    if gradient.is_cuda and gradient.dtype != torch.float32:
        torch.addmm(buffer, gradient.t(), inputs, out_dtype=torch.float32, out=buffer)
    else:
        buffer.addmm_(gradient.t().to(buffer.dtype), inputs.to(buffer.dtype))


def linear(inputs: Tensor, weight: Tensor) -> Tensor:
    """`F.linear` whose weight's gradient goes into its buffer: [..., in] and [out, in] → [..., out]."""
    if main_gradient(weight) is None:
        return F.linear(inputs, weight)
    result: Tensor = _Linear.apply(inputs, weight)
    return result


def look_up(weight: Tensor, rows: Tensor, padding_row: int | None) -> Tensor:
    """`F.embedding` whose weight's gradient goes into its buffer: rows [...] of a table [n, width] → [..., width].

    The gradient of each looked up row is added in fp32, in the order of the tokens; no dense gradient is made. The row
    `padding_row` gets none.
    """
    if main_gradient(weight) is None:
        return F.embedding(rows, weight, padding_idx=padding_row)
    result: Tensor = _LookUp.apply(weight, rows, padding_row)
    return result


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.buffer = main_gradient(weight)  # not saved: the buffer changes between forward and backward
        return F.linear(inputs, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), (inputs, weight) = gradients, ctx.saved_tensors
        add_product(ctx.buffer, gradient.flatten(0, -2), inputs.flatten(0, -2))
        return gradient @ weight if ctx.needs_input_grad[0] else None, None


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, rows: Tensor, padding_row: int | None) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.buffer, ctx.padding_row = main_gradient(weight), padding_row
        return F.embedding(rows, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), (rows,) = gradients, ctx.saved_tensors
        values = gradient.flatten(0, -2).to(ctx.buffer.dtype)
        if ctx.padding_row is not None:
            values = values.masked_fill((rows == ctx.padding_row).flatten()[:, None], 0.0)
        ctx.buffer.index_put_((rows.flatten(),), values, accumulate=True)  # sorted on CUDA, so always the same bits
        return None, None, None

"""RMSNorm of Gemma 4: in fp32, times the plain weight, then rounded once."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from mimo_gemma4.language.kernels.elementwise import add_normalised, normalise_and_rotate


class RMSNorm(nn.Module):
    """Root-mean-square normalisation of the last dimension, whose size is `size`."""

    def __init__(self, size: int, epsilon: float, *, dtype: torch.dtype, device: torch.device) -> None:
        """Allocate the weight, all ones."""
        super().__init__()
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.ones(size, dtype=dtype, device=device))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Normalise [..., size]."""
        return normalise(states, self.epsilon, self.weight)

    def rotated(self, states: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Normalise [S, B, heads, size] and turn it by the angles of `tables` (`rotary_tables`)."""
        return normalise_and_rotate(states, self.weight, self.epsilon, tables)

    def add_to(self, residual: torch.Tensor, branch: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
        """(residual + normalised branch) * scale, each [..., size]; `scale` is a constant of one element."""
        return add_normalised(residual, branch, self.weight, self.epsilon, scale)


def normalise(states: torch.Tensor, epsilon: float, weight: torch.Tensor | None = None) -> torch.Tensor:
    """RMSNorm of the last dimension; `weight`, if any, has its size."""
    if states.device.type == "cpu" and states.dtype == torch.float32:
        return _Normalise.apply(states, epsilon, weight)
    return F.rms_norm(states, states.shape[-1:], weight, epsilon)


class _Normalise(torch.autograd.Function):
    """RMSNorm for CPUs, where torch has no fused one and takes three times as long for the derivatives of its parts.

    With n = x / sqrt(mean(x^2) + epsilon) and y = n w: dw = sum(dy n), and dx = (dy w - n mean(dy w n)) / sqrt(...).
    """

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, epsilon: float, weight: torch.Tensor | None) -> torch.Tensor:
        inverse = states.square().mean(-1, keepdim=True).add_(epsilon).rsqrt_()
        ctx.save_for_backward(states, inverse, weight)
        normalised = states * inverse
        return normalised if weight is None else normalised.mul_(weight)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        states, inverse, weight = ctx.saved_tensors
        (gradient,), of_weight = gradients, None
        normalised = states * inverse
        if weight is not None:
            if ctx.needs_input_grad[2]:
                of_weight = (gradient * normalised).flatten(0, -2).sum(0)
            gradient = gradient * weight
        along = (gradient * normalised).mean(-1, keepdim=True)
        return torch.addcmul(gradient, normalised, along, value=-1).mul_(inverse), None, of_weight

"""Element-wise work of a layer in one kernel each way, with the derivatives written out.

On CUDA the functions below are compiled, once for every width and whatever the number of tokens; elsewhere they run as
they are. Each saves its inputs alone for the backward pass.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo import config as dynamo

from mimo_gemma4.weights.main_gradients import main_gradient

PROGRAMS = 64
"""Most programs that one function is compiled to: one for every combination of widths and types in a model."""
GELU_SLOPE = (2.0 / torch.pi) ** 0.5
GELU_CUBIC = 0.044715


def gated_gelu(gate_and_up: Tensor) -> Tensor:
    """gelu(gate) * up of [..., 2 * I], whose halves are gate and up → [..., I]; gelu in its tanh form."""
    result: Tensor = _GatedGelu.apply(gate_and_up)
    return result


Tables = tuple[Tensor, Tensor]
"""Cosine and sine of rotary positions, each [S, B, 1, D]; both halves of D are equal."""


def add_normalised(residual: Tensor, branch: Tensor, weight: Tensor, epsilon: float, scale: Tensor | None) -> Tensor:
    """(residual + RMSNorm(branch) * weight) * scale of [..., H]; `weight` [H], `scale` a constant of one element."""
    result: Tensor = _AddNormalised.apply(residual, branch, weight, epsilon, scale)
    return result


def normalise_and_rotate(states: Tensor, weight: Tensor, epsilon: float, tables: Tables) -> Tensor:
    """RMSNorm of [S, B, heads, D] times `weight` [D], turned by the angles of `tables`."""
    result: Tensor = _NormaliseAndRotate.apply(states, weight, epsilon, *tables)
    return result


class _GatedGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_and_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_and_up)
        flat = gate_and_up.flatten(0, -2)
        return _run(_gated_gelu, flat).view(*gate_and_up.shape[:-1], gate_and_up.shape[-1] // 2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (gradient,), (gate_and_up,) = gradients, ctx.saved_tensors
        flat = gate_and_up.flatten(0, -2)
        return _run(_gated_gelu_gradient, flat, gradient.flatten(0, -2)).view_as(gate_and_up)


class _AddNormalised(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, residual: Tensor, branch: Tensor, weight: Tensor, epsilon: float, scale: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(branch, weight, scale)
        ctx.epsilon, ctx.buffer = epsilon, main_gradient(weight)
        flat = branch.flatten(0, -2)
        return _run(_add_normalised, flat, residual.flatten(0, -2), weight, epsilon, scale).view_as(residual)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), (branch, weight, scale) = gradients, ctx.saved_tensors
        flat = branch.flatten(0, -2)
        of_residual, of_branch, of_weight = _run(
            _add_normalised_gradient, flat, weight, ctx.epsilon, scale, gradient.flatten(0, -2), ctx.needs_input_grad[2]
        )
        of_weight = _kept(of_weight, weight, ctx.buffer)
        return of_residual.view_as(gradient), of_branch.view_as(branch), of_weight, None, None


class _NormaliseAndRotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, epsilon: float, cosine: Tensor, sine: Tensor) -> Tensor:
        ctx.save_for_backward(states, weight, cosine, sine)
        ctx.epsilon, ctx.buffer = epsilon, main_gradient(weight)
        flat, *tables = (part.flatten(0, 1) for part in (states, cosine, sine))
        return _run(_normalise_and_rotate, flat, weight, epsilon, *tables).view_as(states)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        states, weight, cosine, sine = ctx.saved_tensors
        flat, *others = (part.flatten(0, 1) for part in (states, cosine, sine, gradients[0]))
        of_states, of_weight = _run(
            _normalise_and_rotate_gradient, flat, weight, ctx.epsilon, *others, ctx.needs_input_grad[1]
        )
        of_weight = _kept(of_weight, weight, ctx.buffer)
        return of_states.view_as(states), of_weight, None, None, None


def _kept(of_weight: Tensor | None, weight: Tensor, buffer: Tensor | None) -> Tensor | None:
    """A weight's gradient: put into its buffer if it has one, else returned to autograd. None: it is frozen."""
    if of_weight is None:
        return None
    if buffer is not None:
        buffer += of_weight
        return None
    return of_weight.to(weight.dtype)


@cache
def _program(function: Callable[..., Any]) -> Callable[..., Any]:
    # Dynamo would run what it meets beyond its limit of 8 uncompiled.
    dynamo.recompile_limit = max(PROGRAMS, dynamo.recompile_limit)
    return torch.compile(function)


def _run(function: Callable[..., Any], tokens: Tensor, *others: Any) -> Any:
    """The function of a tensor [tokens, …] and more: compiled on CUDA, for any number of tokens."""
    if not tokens.is_cuda:
        return function(tokens, *others)
    for argument in (tokens, *others):
        if isinstance(argument, Tensor) and argument.shape[0] == tokens.shape[0]:
            torch._dynamo.maybe_mark_dynamic(argument, 0)
    return _program(function)(tokens, *others)


def _wide(states: Tensor) -> Tensor:
    """In fp32, or in fp64 where it is that."""
    return states if states.dtype == torch.float64 else states.float()


def _gated_gelu(gate_and_up: Tensor) -> Tensor:
    gate, up = gate_and_up.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh") * up


def _gated_gelu_gradient(gate_and_up: Tensor, gradient: Tensor) -> Tensor:
    """With t = tanh(k (x + c x^3)): gelu(x) = x (1 + t) / 2, its slope (1 + t) / 2 + x (1 - t^2) k (1 + 3c x^2) / 2."""
    gate, up = (_wide(half) for half in gate_and_up.chunk(2, dim=-1))
    square = gate * gate
    tanh = torch.tanh(GELU_SLOPE * gate * (1.0 + GELU_CUBIC * square))
    half = 0.5 * (1.0 + tanh)
    slope = half + 0.5 * gate * (1.0 - tanh * tanh) * GELU_SLOPE * (1.0 + 3.0 * GELU_CUBIC * square)
    of_result = _wide(gradient)
    return torch.cat((of_result * up * slope, of_result * gate * half), dim=-1).to(gate_and_up.dtype)


def _add_normalised(branch: Tensor, residual: Tensor, weight: Tensor, epsilon: float, scale: Tensor | None) -> Tensor:
    normalised, _ = _normalised(branch, epsilon)
    total = residual + (normalised * _wide(weight)).to(branch.dtype)
    return total if scale is None else total * scale


def _add_normalised_gradient(
    branch: Tensor, weight: Tensor, epsilon: float, scale: Tensor | None, gradient: Tensor, trains: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    of_total = gradient if scale is None else gradient * scale
    return of_total, *_normalised_gradient(branch, weight, epsilon, _wide(of_total), trains)


def _normalise_and_rotate(states: Tensor, weight: Tensor, epsilon: float, cosine: Tensor, sine: Tensor) -> Tensor:
    normalised, _ = _normalised(states, epsilon)
    first, second = (normalised * _wide(weight)).to(states.dtype).chunk(2, dim=-1)
    cosine, sine = (table.chunk(2, dim=-1)[0] for table in (cosine, sine))
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)


def _normalise_and_rotate_gradient(
    states: Tensor, weight: Tensor, epsilon: float, cosine: Tensor, sine: Tensor, gradient: Tensor, trains: bool
) -> tuple[Tensor, Tensor | None]:
    """The gradient turned back, then that of the norm."""
    first, second = _wide(gradient).chunk(2, dim=-1)
    cosine, sine = (_wide(table.chunk(2, dim=-1)[0]) for table in (cosine, sine))
    turned = torch.cat((first * cosine + second * sine, second * cosine - first * sine), dim=-1)
    return _normalised_gradient(states, weight, epsilon, turned, trains)


def _normalised(states: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """n = x / sqrt(mean(x^2) + epsilon), and one over the root."""
    wide = _wide(states)
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return wide * inverse, inverse


def _normalised_gradient(
    states: Tensor, weight: Tensor, epsilon: float, gradient: Tensor, trains: bool
) -> tuple[Tensor, Tensor | None]:
    """Of y = n w: dx = (dy w - n mean(dy w n)) / sqrt(mean(x^2) + epsilon), and dw = sum(dy n)."""
    normalised, inverse = _normalised(states, epsilon)
    of_weight = (gradient * normalised).flatten(0, -2).sum(0) if trains else None
    of_normalised = gradient * _wide(weight)
    along = (of_normalised * normalised).mean(-1, keepdim=True)
    return ((of_normalised - normalised * along) * inverse).to(states.dtype), of_weight

"""Fused element-wise functions and their written-out derivatives are those of the operations one after the other."""

import pytest
import torch
import torch.nn.functional as F

from mimo_gemma4.language.kernels.elementwise import add_normalised, gated_gelu, normalise_and_rotate
from mimo_gemma4.language.rotary import rotary_tables

TOKENS, WIDTH, EPSILON = 13, 24, 1e-6


def inputs(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes]


def norm(states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(states, states.shape[-1:], weight, EPSILON)


def rotated(states: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    first, second = states.chunk(2, dim=-1)
    return states * tables[0] + torch.cat((-second, first), dim=-1) * tables[1]


def check(fused, plain, states: list[torch.Tensor]) -> None:
    """In fp64, whose rounding is far below 1e-10 here."""
    results = []
    for function in (fused, plain):
        result = function(*states)
        results.append([result, *torch.autograd.grad(result.sin().sum(), states)])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


def test_gated_gelu() -> None:
    def plain(gate_and_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_and_up.chunk(2, dim=-1)
        return F.gelu(gate, approximate="tanh") * up

    check(gated_gelu, plain, inputs((TOKENS, 2, 2 * WIDTH)))


@pytest.mark.parametrize("scale", [None, 0.7])
def test_add_normalised(scale: float | None) -> None:
    factor = None if scale is None else torch.tensor([scale], dtype=torch.float64)

    def plain(residual: torch.Tensor, branch: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        total = residual + norm(branch, weight)
        return total if factor is None else total * factor

    def fused(residual: torch.Tensor, branch: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return add_normalised(residual, branch, weight, EPSILON, factor)

    check(fused, plain, inputs((TOKENS, 2, WIDTH), (TOKENS, 2, WIDTH), (WIDTH,)))


def test_normalise_and_rotate() -> None:
    positions = torch.arange(TOKENS).expand(2, TOKENS)
    tables = rotary_tables(positions, torch.rand(WIDTH // 2, generator=torch.Generator().manual_seed(1)), torch.float64)

    def fused(states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return normalise_and_rotate(states, weight, EPSILON, tables)

    check(fused, lambda states, weight: rotated(norm(states, weight), tables), inputs((TOKENS, 2, 3, WIDTH), (WIDTH,)))


def test_weights_with_a_buffer_get_their_gradient_there() -> None:
    residual, branch, weight = inputs((TOKENS, 1, WIDTH), (TOKENS, 1, WIDTH), (WIDTH,))
    (expected,) = torch.autograd.grad(add_normalised(residual, branch, weight, EPSILON, None).sin().sum(), [weight])
    weight.main_grad = torch.ones(WIDTH, dtype=torch.float64)  # type: ignore[attr-defined]
    add_normalised(residual, branch, weight, EPSILON, None).sin().sum().backward()
    assert weight.grad is None
    torch.testing.assert_close(weight.main_grad, expected + 1, rtol=1e-10, atol=1e-10)  # type: ignore[attr-defined]

"""Compiled element-wise kernels and fused weight gradients are as exact as the operations one after the other.

pytest -m gpu
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from mimo_gemma4.language.kernels.elementwise import add_normalised, gated_gelu, normalise_and_rotate
from mimo_gemma4.language.rotary import rotary_tables
from mimo_gemma4.weights.main_gradients import add_product, look_up

pytestmark = pytest.mark.gpu
EPSILON = 1e-6


def drawn(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape, device="cuda").to(torch.bfloat16) for shape in shapes]


def norm(states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(states, states.shape[-1:], weight, EPSILON)


def results(function: Callable[..., torch.Tensor], inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    inputs = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    result = function(*inputs)
    return [result.double(), *(g.double() for g in torch.autograd.grad(result, inputs, torch.ones_like(result)))]


def check(fused: Callable[..., torch.Tensor], plain: Callable[..., torch.Tensor], inputs: list[torch.Tensor]) -> None:
    """Off the truth in fp64 by no more than the plain operations in bf16, or by one rounding of bf16 (4e-3)."""
    truth = results(plain, [tensor.double() for tensor in inputs])
    for ours, peer, true in zip(results(fused, inputs), results(plain, inputs), truth, strict=True):
        error, noise = ((part - true).norm() / true.norm() for part in (ours, peer))
        assert error <= max(1.1 * noise, 4e-3), f"{error:.1e}, plain {noise:.1e}"


@pytest.mark.parametrize("tokens", [1000, 1371])
def test_gated_gelu(tokens: int) -> None:
    def plain(gate_and_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_and_up.chunk(2, dim=-1)
        return F.gelu(gate, approximate="tanh") * up

    check(gated_gelu, plain, drawn((tokens, 1, 2 * 10240)))


@pytest.mark.parametrize("tokens", [1000, 1371])
def test_add_normalised(tokens: int) -> None:
    scale = torch.tensor([0.75], device="cuda", dtype=torch.bfloat16)
    check(
        lambda residual, branch, weight: add_normalised(residual, branch, weight, EPSILON, scale),
        lambda residual, branch, weight: (residual + norm(branch, weight)) * scale.to(residual.dtype),
        drawn((tokens, 1, 2560), (tokens, 1, 2560), (2560,)),
    )


@pytest.mark.parametrize("tokens", [1000, 1371])
def test_normalise_and_rotate(tokens: int) -> None:
    frequencies = 1e4 ** (-torch.arange(128, device="cuda") / 128)
    tables = rotary_tables(torch.arange(tokens, device="cuda")[None], frequencies, torch.bfloat16)

    def plain(states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        cosine, sine = (table.to(states.dtype) for table in tables)
        first, second = norm(states, weight).chunk(2, dim=-1)
        return norm(states, weight) * cosine + torch.cat((-second, first), dim=-1) * sine

    check(
        lambda states, weight: normalise_and_rotate(states, weight, EPSILON, tables),
        plain,
        drawn((tokens, 1, 8, 256), (256,)),
    )


def test_programs_serve_any_number_of_tokens() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for tokens in (1000, 1024, 1371, 2003):
        gated_gelu(*(tensor.requires_grad_() for tensor in drawn((tokens, 1, 512)))).sum().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2, "one forward, one backward"


def test_products_are_added_in_fp32() -> None:
    gradient, inputs = drawn((1371, 2560), (1371, 640))
    buffer = torch.full((2560, 640), 0.5, device="cuda")
    add_product(buffer, gradient, inputs)
    truth = 0.5 + gradient.double().t() @ inputs.double()
    assert (buffer - truth).norm() / truth.norm() < 1e-5


def test_looked_up_rows_get_their_gradients_always_in_the_same_order() -> None:
    rows = torch.randint(0, 50, (1371, 1), generator=torch.Generator().manual_seed(1)).cuda()
    (table, gradient) = drawn((64, 256), (1371, 1, 256))
    buffers = []
    for _ in range(2):
        weight = torch.nn.Parameter(table.clone())
        weight.main_grad = torch.zeros(64, 256, device="cuda")  # type: ignore[attr-defined]
        look_up(weight, rows, 7).backward(gradient)
        assert weight.grad is None
        buffers.append(weight.main_grad)
    truth = torch.zeros(64, 256, device="cuda", dtype=torch.float64)
    truth.index_add_(0, rows.flatten(), gradient.flatten(0, 1).double())
    truth[7] = 0.0
    assert torch.equal(*buffers)
    assert (buffers[0] - truth).norm() / truth.norm() < 1e-5

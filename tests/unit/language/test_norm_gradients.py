"""RMSNorm on the CPU, and its derivatives, which are written out there, are those of torch's in fp64."""

import pytest
import torch
import torch.nn.functional as F

from mimo_gemma4.language.norm import normalise

EPSILON = 1e-3
"""Large enough to show in the result."""


@pytest.mark.parametrize("weighted", [True, False])
def test_value_and_gradients(weighted: bool) -> None:
    """Tolerance: sums of 24 fp32 numbers, and of 40 for the weight."""
    generator = torch.Generator().manual_seed(0)
    states, weighting = (torch.randn(5, 8, 24, generator=generator) * scale for scale in (0.1, 1.0))
    weight = torch.rand(24, generator=generator) + 0.5 if weighted else None
    results = []
    for dtype in (torch.float32, torch.float64):
        inputs = [tensor.to(dtype).requires_grad_() for tensor in (states, weight) if tensor is not None]
        if dtype == torch.float32:
            normalised = normalise(inputs[0], EPSILON, *inputs[1:])
        else:
            normalised = F.rms_norm(inputs[0], (24,), *inputs[1:], eps=EPSILON)
        gradients = torch.autograd.grad((normalised * weighting).sum(), inputs)
        results.append([normalised.double(), *(gradient.double() for gradient in gradients)])
    for mine, expected in zip(*results, strict=True):
        torch.testing.assert_close(mine, expected, rtol=2e-6, atol=2e-6)


def test_a_frozen_weight_gets_no_gradient() -> None:
    states, weight = torch.randn(3, 6, requires_grad=True), torch.ones(6)
    normalise(states, EPSILON, weight).sum().backward()
    assert states.grad is not None and weight.grad is None

"""Experts in bf16 on a GPU: the grouped kernel gives each token its expert's result; a single rank never waits for it.

Reference: every token by itself in fp32 from the same bf16 weights. Relative error of the whole, forward and
gradients: 1%, some bf16 roundings (0.4% each) of sums of 256 terms. Some experts get no token; their gradient is zero.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from mimo_gemma4.language.config import Gemma4TextConfig
from mimo_gemma4.language.dispatch import Dispatch
from mimo_gemma4.language.moe import Experts, MixtureOfExperts
from mimo_gemma4.weights.bindings import initialise
from tests.dist.harness import rank_device, run_ranks
from tests.dist.language.language_ranks import language_groups

pytestmark = pytest.mark.gpu

TOKENS, BUSY = 300, (0, 2, 3, 7)
TEXT = Gemma4TextConfig(
    hidden_size=256, moe_intermediate_size=64, num_experts=8, top_k_experts=2, enable_moe_block=True
)


def make(kind: type, rank: int) -> tuple[Any, Any]:
    """A module of random bf16 weights on this rank's device, and its process groups."""
    groups, device = language_groups(rank, 1, 1), rank_device()
    sizes = {"tp": 1, "cp": 1, "sequence_parallel": False, "dtype": torch.bfloat16, "device": device}
    module = kind(TEXT, TEXT.transformer_config(**sizes), groups, device)
    initialise(module.bindings(""), seed=0)
    return module, groups


def each_token(tokens: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor, experts: Experts) -> torch.Tensor:
    """[T, H] in fp32: one product for every copy of every token."""
    gate_up, down = experts.gate_up.float()[chosen], experts.down.float()[chosen]
    gate, up = torch.einsum("tkih,th->tki", gate_up, tokens.float()).chunk(2, dim=-1)
    results = torch.einsum("tkhi,tki->tkh", down, F.gelu(gate, approximate="tanh") * up)
    return (results * weights.unsqueeze(-1)).sum(dim=1)


def kernel_rank(rank: int) -> None:
    experts, groups = make(Experts, rank)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(TOKENS, TEXT.hidden_size, generator=generator).bfloat16().to(rank_device()).requires_grad_()
    weights = torch.rand(TOKENS, 2, generator=generator).to(rank_device()).requires_grad_()
    chosen = torch.stack([torch.randperm(len(BUSY), generator=generator)[:2] for _ in range(TOKENS)])
    chosen = torch.tensor(BUSY)[chosen].to(rank_device())
    upstream = torch.randn(TOKENS, TEXT.hidden_size, generator=generator).bfloat16().to(rank_device())
    leaves = [tokens, weights, experts.gate_up, experts.down]

    dispatch = Dispatch(chosen, TEXT.num_experts, groups.ep)
    output = dispatch.combine(experts(*dispatch.dispatch(tokens, weights), dispatch))
    gradients = torch.autograd.grad(output, leaves, upstream)
    expected = each_token(tokens, weights, chosen, experts)
    expected_gradients = torch.autograd.grad(expected, leaves, upstream.float())
    for found, truth in zip([output, *gradients], [expected, *expected_gradients], strict=True):
        assert (found.float() - truth.float()).norm() <= 0.01 * truth.float().norm()
    idle = [number for number in range(TEXT.num_experts) if number not in BUSY]
    assert all(gradient[idle].count_nonzero() == 0 for gradient in gradients[2:])


def unasked_wait_rank(rank: int) -> None:
    branch, _ = make(MixtureOfExperts, rank)
    hidden = torch.randn(TOKENS, 1, TEXT.hidden_size, device=rank_device(), dtype=torch.bfloat16, requires_grad=True)
    branch(branch.route(hidden)).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    branch(branch.route(hidden)).sum().backward()
    torch.cuda.set_sync_debug_mode("default")


def test_grouped_kernel_gives_each_token_its_expert() -> None:
    run_ranks(1, kernel_rank, backend="nccl")


def test_one_rank_never_waits_for_the_device() -> None:
    run_ranks(1, unasked_wait_rank, backend="nccl")

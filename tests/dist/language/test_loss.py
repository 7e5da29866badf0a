"""The chunked, vocabulary-parallel, softcapped loss and its gradients are those of dense fp32 cross entropy."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from mimo_gemma4.language.loss import summed_cross_entropy
from tests.dist.harness import run_ranks

TOKENS, HIDDEN, VOCABULARY = 23, 16, 40


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator)
    labels = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    labels[::4] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), labels


def sharded(rank: int, cap: float | None, words_at_once: int) -> tuple[torch.Tensor, ...]:
    hidden, weight, labels = inputs()
    rows = VOCABULARY // dist.get_world_size()
    mine = weight.detach()[rank * rows : (rank + 1) * rows].clone().requires_grad_()
    arguments = {"cap": cap, "tp_group": dist.group.WORLD, "logits_at_once": words_at_once * TOKENS}
    loss = summed_cross_entropy(hidden, mine, labels, **arguments)
    (3.0 * loss).backward()
    with torch.no_grad():
        assert summed_cross_entropy(hidden, mine, labels, **arguments) == loss
    return loss.detach(), hidden.grad, mine.grad


@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize("words_at_once", [5, 100])
@pytest.mark.parametrize("ranks", [1, 2])
def test_matches_dense_cross_entropy(cap: float | None, words_at_once: int, ranks: int) -> None:
    hidden, weight, labels = inputs()
    logits = F.linear(hidden, weight)
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    expected = F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
    (3.0 * expected).backward()

    results = run_ranks(ranks, sharded, cap, words_at_once)
    # fp32 sums of a few dozen terms
    for loss, _, _ in results:
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(sum(gradient for _, gradient, _ in results), hidden.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat([gradient for *_, gradient in results]), weight.grad, rtol=1e-5, atol=1e-5)

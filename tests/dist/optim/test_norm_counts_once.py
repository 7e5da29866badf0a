"""The gradient norm counts each element of each trainable Hugging Face parameter once, however it is replicated.

Gradients are set by hand, so the expected norm is that of one known tensor per name. fp64 sums of fp32 squares: 1e-12.
"""

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from mimo_gemma4.config import OptimConfig
from mimo_gemma4.optim.module_optimizer import ModuleOptimizer
from mimo_gemma4.optim.step_reduction import StepReduction
from mimo_gemma4.weights.bindings import Binding
from tests.dist.harness import run_ranks
from tests.dist.optim.toy_modules import toy_world

SHAPES = {"q": (8, 5), "k": (4, 5), "norm": (5,), "head": (12, 5), "frozen": (3, 5)}


class Replicas(nn.Module):
    """Queries cut over tp, two key heads shared by halves of the tp group in one local tensor, a padded vocabulary."""

    def __init__(self, tp: int, rank: int):
        super().__init__()
        self.config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=4)
        queries, vocabulary = 8 // tp, 16 // tp  # 12 rows padded to 16
        heads = max(1, 2 // tp)
        self.fused = nn.Parameter(torch.zeros(queries + 2 * heads, 5))
        self.norm = nn.Parameter(torch.zeros(5))
        self.head = nn.Parameter(torch.zeros(vocabulary, 5))
        self.frozen = nn.Parameter(torch.zeros(3, 5), requires_grad=False)
        self.register_buffer("scale", torch.ones(1))
        width, first = slice(0, 5), rank * vocabulary
        key_head = rank * 2 // tp * 2
        last = max(first, min(first + vocabulary, 12))
        self._bindings = [
            Binding("q", SHAPES["q"], (_cut(rank, queries), width), self.fused, (slice(0, queries), width)),
            Binding(
                "k",
                SHAPES["k"],
                (slice(key_head, key_head + 2 * heads), width),
                self.fused,
                (slice(queries, queries + 2 * heads), width),
            ),
            Binding("norm", SHAPES["norm"], (width,), self.norm, (width,)),
            Binding("head", SHAPES["head"], (slice(first, last), width), self.head, (slice(0, last - first), width)),
            Binding("head", SHAPES["head"], (slice(first, last), width), self.head, (slice(0, last - first), width)),
            Binding("frozen", SHAPES["frozen"], (slice(0, 3), width), self.frozen, (slice(0, 3), width)),
            Binding("scale", (1,), (slice(0, 1),), self.scale, (slice(0, 1),)),
        ]

    def bindings(self) -> list[Binding]:
        return self._bindings


def _cut(rank: int, part: int) -> slice:
    return slice(rank * part, (rank + 1) * part)


def gradient(name: str) -> torch.Tensor:
    return torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(len(name) * 31 + ord(name[0])))


def norm(rank: int, tp: int) -> float:
    layout, groups = toy_world({"language": (tuple(range(4)), tp)})
    language = groups.modules["language"]
    optimizer = ModuleOptimizer(Replicas(tp, language.tp.rank()), language, OptimConfig())
    for binding in optimizer.bindings:
        if binding.tensor.requires_grad:
            binding.view(binding.tensor.main_grad).copy_(gradient(binding.name)[binding.index])
    optimizer.module.head.main_grad[12 - min(12, 16 // tp * language.tp.rank()) :].fill_(100.0)  # padding never counts
    agreed = StepReduction(layout, None, torch.device("cpu")).reduce({"language": optimizer})
    return agreed.grad_norm.item()  # no loss tokens: N is 1


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_norm_counts_each_element_once(tp):
    expected = sum(gradient(name).double().square().sum() for name in SHAPES if name != "frozen").sqrt().item()
    assert run_ranks(4, norm, tp) == pytest.approx([expected] * 4, rel=1e-12)

"""Every variant's loss and gradients do not depend on how many context-parallel ranks share a sequence.

The reference is the same model on one rank, which `test_language_parity` compares with transformers.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any

import pytest
import torch

from mimo_gemma4.language.attention_context import attention_context
from mimo_gemma4.language.config import FULL, SLIDING, Gemma4TextConfig
from mimo_gemma4.language.model import Gemma4LanguageModel
from mimo_gemma4.partition import cp_token_index
from mimo_gemma4.weights.bindings import initialise
from tests.dist.harness import run_ranks
from tests.dist.language.language_ranks import language_groups

COMMON = dict(
    vocab_size=64,
    vocab_size_per_layer_input=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=6,
    layer_types=(SLIDING, SLIDING, FULL) * 2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    global_head_dim=16,
    initializer_range=0.15,
    final_logit_softcapping=3.0,
    hidden_size_per_layer_input=0,
)
SHARED = dict(hidden_size_per_layer_input=10, num_kv_shared_layers=3)
VISION = dict(use_bidirectional_attention="vision", attention_k_eq_v=True, num_global_key_value_heads=1)
VARIANTS: dict[str, dict[str, Any]] = {
    "e2b": COMMON | SHARED | dict(num_key_value_heads=1, use_double_wide_mlp=True),
    "e4b": COMMON | SHARED,
    "12b": COMMON | VISION | dict(model_type="gemma4_unified_text"),
    "31b": COMMON | VISION,
}
# Lengths of the documents of each sequence. Media cover tokens 3 to 17 and, in those long enough, 17 to 23 beside them:
# longer and shorter than the windows, and across borders between ranks.
DOCUMENTS = {"padded": [[90], [37]], "zigzag pack": [[28, 17, 41]], "contiguous pack": [[28, 17, 41]]}
LENGTH = {"padded": 96, "zigzag pack": 112, "contiguous pack": 96}
MEDIA = (slice(3, 17), slice(17, 23))


@dataclass(frozen=True)
class Case:
    """A model, a batch, and how both are cut. Up to eight context-parallel ranks a chunk has 1 to 28 tokens."""

    variant: str
    pack: str
    """Key of `DOCUMENTS`."""
    window: int
    tp: int = 1
    cp: int = 1
    sequence_parallel: bool = False
    checkpointing: str = "none"

    @property
    def alone(self) -> "Case":
        """The same on one rank."""
        return replace(self, tp=1, cp=1, sequence_parallel=False, checkpointing="none")

    @cached_property
    def starts(self) -> list[int]:
        """Where the documents of the first sequence start, and its end."""
        multiple = 16 if self.pack == "zigzag pack" else 1
        starts = [0]
        for length in DOCUMENTS[self.pack][0][:-1]:
            starts.append(starts[-1] + -(-length // multiple) * multiple)
        return [*starts, LENGTH[self.pack]]

    def held(self) -> list[torch.Tensor]:
        """Sequence indices of each context-parallel rank."""
        starts = self.starts if self.pack == "zigzag pack" else None
        layout = "contiguous" if self.pack == "contiguous pack" else "zigzag"
        return [cp_token_index(LENGTH[self.pack], self.cp, rank, starts, layout) for rank in range(self.cp)]


class Batch:
    """Random tokens and labels with padding, every third label ignored; all [B, S]."""

    def __init__(self, case: Case) -> None:
        documents, generator = DOCUMENTS[case.pack], torch.Generator().manual_seed(3)
        shape = (len(documents), LENGTH[case.pack])
        self.input_ids = torch.randint(1, 64, shape, generator=generator)
        self.labels = torch.randint(0, 64, shape, generator=generator)
        self.labels[torch.rand(shape, generator=generator) < 0.3] = -100
        self.positions, self.segments, self.groups = (torch.zeros(shape, dtype=torch.long) for _ in range(3))
        for sequence, lengths in enumerate(documents):
            for number, (start, length) in enumerate(zip(case.starts, lengths, strict=False), start=1):
                span = slice(start, start + length)
                self.positions[sequence, span], self.segments[sequence, span] = torch.arange(length), number
                for item, media in enumerate(MEDIA):
                    self.groups[sequence, start + media.start : start + min(media.stop, length)] = 2 * number + item
        padding = self.segments == 0
        self.input_ids[padding], self.labels[padding], self.groups[padding] = 0, -100, 0


def rank_result(rank: int, case: Case) -> dict[str, Any]:
    """Loss and slices of gradients of one rank, and which of these add up over tensor-parallel ranks."""
    text = Gemma4TextConfig(**VARIANTS[case.variant] | {"sliding_window": case.window})
    groups, device = language_groups(rank, case.tp, case.cp), torch.device("cpu")
    model = Gemma4LanguageModel(
        text,
        groups,
        sequence_parallel=case.sequence_parallel,
        dtype=torch.float32,
        device=device,
        activation_checkpointing=case.checkpointing,
    )
    bindings = model.bindings()
    initialise(bindings, 0)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():  # norms that differ per channel
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.mul_(torch.rand(parameter.shape, generator=generator) * 0.6 + 0.7)
    batch, held = Batch(case), case.held()
    mine = held[rank // case.tp]
    context = attention_context(
        text, batch.positions, batch.segments, batch.groups, held=held, cp_group=groups.cp, put=torch.clone
    )
    ids = batch.input_ids[:, mine]
    hidden = model(model.first_inputs(model.embed(ids)), ids, context).hidden
    loss = model.loss(hidden, batch.labels[:, mine])
    loss.backward()
    slices = []
    for binding in bindings:
        if binding.tensor.requires_grad:
            is_part = getattr(binding.tensor, "tensor_model_parallel", False) or "tp" in binding.gradient_sum
            slices.append((binding.name, binding.shape, binding.index, binding.view(binding.tensor.grad), is_part))
    return {"tp_rank": rank % case.tp, "loss": loss.item(), "finite": bool(hidden.isfinite().all()), "slices": slices}


def all_results(rank: int, cases: list[Case]) -> list[dict[str, Any]]:
    return [rank_result(rank, case) for case in cases]


def loss_and_gradients(results: list[dict[str, Any]]) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of all ranks; what every tensor-parallel rank has whole counts once."""
    gradients: dict[str, torch.Tensor] = {}
    for result in results:
        assert result["finite"]
        for name, shape, index, part, summed in result["slices"]:
            whole = gradients.setdefault(name, torch.zeros(shape))
            if summed or result["tp_rank"] == 0:
                whole[index] += part
    return sum(result["loss"] for result in results if result["tp_rank"] == 0), gradients


def check(cases: list[Case]) -> None:
    """Name every loss and gradient that is not one rank's."""
    alone = list({case.alone: None for case in cases})
    references = dict(zip(alone, run_ranks(1, all_results, alone, timeout=280)[0], strict=True))
    found = []
    for world in sorted({case.tp * case.cp for case in cases}):
        here = [case for case in cases if case.tp * case.cp == world]
        ranks = run_ranks(world, all_results, here, timeout=280)
        for number, case in enumerate(here):
            loss, gradients = loss_and_gradients([results[number] for results in ranks])
            expected_loss, expected = loss_and_gradients([references[case.alone]])
            if abs(loss - expected_loss) > 1e-5 * expected_loss:
                found.append(f"{case}: loss {loss}, expected {expected_loss}")
            # 1e-5 of each gradient, plus 1e-7 of all for those that almost vanish: rounding of fp32 sums of this depth
            overall = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
            for name, gradient in expected.items():
                error, allowed = (gradients[name] - gradient).norm(), 1e-5 * gradient.norm() + 1e-7 * overall
                if not (gradient.norm() > 0 and error <= allowed):
                    found.append(f"{case}: {name} off by {error:.1e}, allowed {allowed:.1e}")
    assert not found, "\n".join(found)


def test_context_parallel_ranks_agree_with_one() -> None:
    """Each variant, kind of batch and number of ranks; windows longer and shorter than a chunk."""
    check(
        [
            Case("e4b", "zigzag pack", 13, cp=8),
            Case("e4b", "contiguous pack", 5, tp=2, cp=2, sequence_parallel=True, checkpointing="full"),
            Case("e2b", "padded", 13, tp=2, cp=4),
            Case("e2b", "zigzag pack", 5, cp=2, checkpointing="full"),
            Case("12b", "padded", 5, cp=8),
            Case("12b", "zigzag pack", 13, tp=2, cp=2, sequence_parallel=True),
            Case("31b", "contiguous pack", 13, cp=4, checkpointing="full"),
            Case("31b", "zigzag pack", 5, tp=2, cp=4, sequence_parallel=True, checkpointing="full"),
        ]
    )


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_complete_table(variant: str) -> None:
    """All numbers of ranks up to eight, sequence parallelism and checkpointing taking turns."""
    grids = [(1, 2), (1, 4), (1, 8), (2, 1), (2, 2), (2, 4)]
    cases = [
        Case(variant, pack, window, tp, cp, tp > 1 and turn % 2 == 0, ("none", "full")[turn % 3 == 0])
        for turn, (pack, window, (tp, cp)) in enumerate(product(DOCUMENTS, (5, 13), grids))
    ]
    check(cases)

"""Backends agree with attention written out from the definition, and plan blocks and stretches from the same runs."""

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from mimo_gemma4.language.attention_context import MaskRule, VisibleKeys, visible_runs
from mimo_gemma4.language.flex_attention import BLOCK, FlexPlan
from mimo_gemma4.language.reference_attention import QUERIES_PER_BLOCK, ReferencePlan
from mimo_gemma4.language.transformer_engine_attention import TransformerEnginePlan

LENGTH = 2 * QUERIES_PER_BLOCK + 77  # no multiple of any block
RULES = [
    MaskRule(None),
    MaskRule(70),
    MaskRule(70, "inside_window"),
    MaskRule(70, "always"),
    MaskRule(None, "always"),
]


def metadata() -> tuple[torch.Tensor, torch.Tensor]:
    """Two packed sequences with padding between and behind segments, and media items."""
    segments, groups = torch.zeros(2, LENGTH, dtype=torch.long), torch.zeros(2, LENGTH, dtype=torch.long)
    for sequence, spans in enumerate([[(0, 200), (208, 400), (401, 402)], [(0, 500)]]):
        for number, (start, end) in enumerate(spans, start=1):
            segments[sequence, start:end] = number
    groups[0, 20:140], groups[0, 210:215], groups[1, 250:380] = 1, 2, 1
    return segments, groups


def visible(rule: MaskRule, chosen: torch.Tensor | None = None) -> VisibleKeys:
    """What the queries at the sequence indices `chosen` (all) see, as one rank alone would plan it for all keys."""
    segments, groups = metadata()
    chosen = torch.arange(LENGTH) if chosen is None else chosen
    first, last = (ends[:, chosen].int() for ends in visible_runs(rule, segments, groups))
    grouped = rule.groups is not None
    runs = torch.stack((first, last))
    return VisibleKeys(rule, LENGTH, first, last, segments[:, chosen], grouped, runs, None, None)


def dense_mask(keys: VisibleKeys) -> torch.Tensor:
    numbers = torch.arange(keys.count)
    return (numbers >= keys.first[..., None]) & (numbers <= keys.last[..., None])


def tensors(queries: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = [(queries, 2, 4, 8), (LENGTH, 2, 2, 8), (LENGTH, 2, 2, 8)]
    return [torch.randn(shape, dtype=torch.float64).mul_(0.5).requires_grad_() for shape in shapes]


def by_definition(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    key, value = (states.repeat_interleave(2, dim=2) for states in (key, value))
    scores = torch.einsum("qbhd,kbhd->bhqk", query, key).masked_fill(~mask[:, None], -torch.inf)
    return torch.einsum("bhqk,kbhd->qbhd", scores.softmax(-1), value).flatten(2)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_reference_is_the_definition(rule: MaskRule) -> None:
    """Forward and backward in fp64, whose rounding is far below 1e-10 here; queries are two distant chunks."""
    chosen = torch.cat((torch.arange(60, 300), torch.arange(350, LENGTH)))
    keys = visible(rule, chosen)
    results = []
    for attend in (ReferencePlan(keys).attend, lambda *states: by_definition(*states, dense_mask(keys))):
        inputs = tensors(chosen.numel())
        attended = attend(*inputs)
        results.append([attended, *torch.autograd.grad(attended.square().sum(), inputs)])
    for mine, expected in zip(*results, strict=True):
        assert mine.isfinite().all()
        torch.testing.assert_close(mine, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_flex_block_mask_is_the_definition(rule: MaskRule) -> None:
    """FlexAttention's own uncompiled evaluation of the mask function, and every block by counting its pairs."""
    keys = visible(rule)
    mask, plan = dense_mask(keys), FlexPlan(keys)
    query, key, value = (states.detach().permute(1, 2, 0, 3) for states in tensors(LENGTH))
    attended = flex_attention(query, key, value, block_mask=plan.block_mask, scale=1.0, enable_gqa=True)
    expected = by_definition(*(states.detach() for states in tensors(LENGTH)), mask)
    torch.testing.assert_close(attended.permute(2, 0, 1, 3).flatten(2), expected, rtol=1e-10, atol=1e-10)

    missing = -LENGTH % BLOCK
    padded = torch.nn.functional.pad(mask, (0, missing, 0, missing))
    pairs = padded.unflatten(2, (-1, BLOCK)).unflatten(1, (-1, BLOCK)).sum(dim=(2, 4))  # [B, query blocks, key blocks]
    partial = block_occupancy(plan.block_mask.kv_num_blocks, plan.block_mask.kv_indices)
    full = block_occupancy(plan.block_mask.full_kv_num_blocks, plan.block_mask.full_kv_indices)
    assert torch.equal(full, pairs == BLOCK * BLOCK)
    assert not (partial & full).any()
    assert torch.equal(partial | full, pairs > 0)


def block_occupancy(counts: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    occupied = torch.zeros(indices.shape[0], *indices.shape[2:], dtype=torch.bool)
    for sequence in range(indices.shape[0]):
        for block in range(indices.shape[2]):
            listed = indices[sequence, 0, block, : counts[sequence, 0, block]]
            assert listed.unique().numel() == listed.numel()
            occupied[sequence, block, listed.long()] = True
    return occupied


def stretches_mask(plan: TransformerEnginePlan, queries: int) -> torch.Tensor:
    """Who sees whom by the plan, from the definition of a window that ends at each stretch's last key."""
    mask = torch.zeros(queries, LENGTH, dtype=torch.bool)
    for queries, own in plan.stretches:
        shift = (own.stop - own.start) - (queries.stop - queries.start)
        distance = torch.arange(queries.stop - queries.start)[:, None] + shift - torch.arange(own.stop - own.start)
        mask[queries, own] = (distance >= 0) & (distance <= plan.window - 1)
    return mask


# Everything; a zigzag rank's two chunks; two chunks whose windows overlap.
@pytest.mark.parametrize("spans", [[(0, LENGTH)], [(96, 196), (300, 400)], [(100, 120), (130, 150)]], ids=str)
def test_stretches_for_transformer_engine_are_the_definition(spans: list[tuple[int, int]]) -> None:
    chosen = torch.cat([torch.arange(*span) for span in spans])
    segments = torch.zeros(2, LENGTH, dtype=torch.long)
    segments[:, :200], segments[0, 208:500], segments[1, 208:480] = 1, 2, 2  # they differ only in padding
    first, last = (ends[:, chosen].int() for ends in visible_runs(MaskRule(70), segments, None))
    keys = VisibleKeys(
        MaskRule(70), LENGTH, first, last, segments[:, chosen], False, torch.stack((first, last)), None, None
    )
    plan = TransformerEnginePlan.where_supported(keys, 256)
    assert plan is not None
    mask = stretches_mask(plan, len(chosen))
    for sequence, expected in enumerate(dense_mask(keys)):
        real = keys.segments[sequence] > 0  # what padding sees, nothing else notices
        assert torch.equal(mask[real], expected[real].bool())


def test_transformer_engine_leaves_the_rest_to_flex() -> None:
    assert TransformerEnginePlan.where_supported(visible(MaskRule(None)), 256) is None, "full layers"
    assert TransformerEnginePlan.where_supported(visible(MaskRule(70, "always")), 256) is None, "media groups"
    assert TransformerEnginePlan.where_supported(visible(MaskRule(70)), 256) is None, "sequences with other segments"
    one_row = torch.zeros(1, LENGTH, dtype=torch.long)
    one_row[:, : LENGTH // 20 * 20] = 1 + torch.arange(LENGTH // 20 * 20) // 20
    first, last = (ends.int() for ends in visible_runs(MaskRule(70), one_row, None))
    many = VisibleKeys(MaskRule(70), LENGTH, first, last, one_row, False, torch.stack((first, last)), None, None)
    assert TransformerEnginePlan.where_supported(many, 256) is None, "many short documents"
    assert TransformerEnginePlan.where_supported(many, 512) is None, "wide heads"

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
    """Two packed rows with padding between and behind segments, and media items."""
    segments, groups = torch.zeros(2, LENGTH, dtype=torch.long), torch.zeros(2, LENGTH, dtype=torch.long)
    for row, spans in enumerate([[(0, 200), (208, 400), (401, 402)], [(0, 500)]]):
        for number, (start, end) in enumerate(spans, start=1):
            segments[row, start:end] = number
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
    for row in range(indices.shape[0]):
        for block in range(indices.shape[2]):
            listed = indices[row, 0, block, : counts[row, 0, block]]
            assert listed.unique().numel() == listed.numel()
            occupied[row, block, listed.long()] = True
    return occupied


def test_stretches_for_transformer_engine_are_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    """The packed format's mask, written from its definition: a window that ends at each stretch's last key."""
    keys = visible(MaskRule(70))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)  # there is no GPU to pin for
    plan = TransformerEnginePlan.where_supported(keys, 256)
    assert plan is not None
    mask = torch.zeros(2 * LENGTH, 2 * LENGTH, dtype=torch.bool)
    stretches = zip(plan.query_ends[:-1], plan.query_ends[1:], plan.key_ends[:-1], plan.key_ends[1:], strict=True)
    for query_begin, query_end, key_begin, key_end in stretches:
        shift = (key_end - key_begin) - (query_end - query_begin)
        distance = torch.arange(query_end - query_begin)[:, None] + shift - torch.arange(key_end - key_begin)
        mask[query_begin:query_end, key_begin:key_end] = (distance >= 0) & (distance <= plan.window - 1)
        assert query_end - query_begin <= plan.longest_query and key_end - key_begin <= plan.longest_key
    real = (keys.segments > 0).flatten()  # runs of padding see each other, which nothing else notices
    assert torch.equal(mask[real], torch.block_diag(*dense_mask(keys))[real].bool())
    assert TransformerEnginePlan.where_supported(keys, 512) is None
    assert TransformerEnginePlan.where_supported(visible(MaskRule(None)), 256) is None
    assert TransformerEnginePlan.where_supported(visible(MaskRule(70, "always")), 256) is None
    # The two chunks' windows overlap: some keys would have to be in two stretches.
    overlapping = torch.cat((torch.arange(100, 120), torch.arange(130, 150)))
    assert TransformerEnginePlan.where_supported(visible(MaskRule(70), overlapping), 256) is None

"""Calls of packed kernels cover every query once, with the keys that it sees, whatever the layout."""

import pytest
import torch

from mimo_gemma4.language.attention_context import MaskRule, VisibleKeys, visible_runs
from mimo_gemma4.language.kernels.packed import MOST_CALLS, PackedCall, PackedPlan, packed_calls
from mimo_gemma4.language.reference_attention import ReferencePlan
from mimo_gemma4.partition import cp_token_index

LENGTH, HEADS, KEY_VALUE_HEADS, CHANNELS = 96, 4, 2, 8
ROWS = {
    "one document": [[96]],
    "documents": [[13, 1, 40, 30, 12]],
    "padding": [[13, 40, -3, 30, -10]],
    "two sequences": [[70, -26], [96]],
}


def visible(rule: MaskRule, lengths: list[list[int]], held: torch.Tensor | None = None) -> VisibleKeys:
    """What the queries at the sequence indices `held` (all) see of documents (negative: padding) of these lengths."""
    segments = torch.zeros(len(lengths), LENGTH, dtype=torch.long)
    for sequence, documents in enumerate(lengths):
        start = 0
        for number, size in enumerate(documents, 1):
            segments[sequence, start : start + abs(size)] = number if size > 0 else 0
            start += abs(size)
    held = torch.arange(LENGTH) if held is None else held
    first, last = (ends[:, held].int() for ends in visible_runs(rule, segments, None))
    return VisibleKeys(rule, LENGTH, first, last, segments[:, held], False, torch.stack((first, last)), None, None)


def kernel_of(window: int | None):
    """What a packed kernel is to do, written out: causal from the end of each stretch's keys."""

    def kernel(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: PackedCall) -> torch.Tensor:
        parts = []
        ends = zip(call.query_ends, call.query_ends[1:], call.key_ends, call.key_ends[1:], strict=False)
        for query_begin, query_end, key_begin, key_end in ends:
            q, k, v = query[query_begin:query_end], key[key_begin:key_end], value[key_begin:key_end]
            k, v = (states.repeat_interleave(HEADS // KEY_VALUE_HEADS, dim=1) for states in (k, v))
            behind = torch.arange(len(k)) - (torch.arange(len(q))[:, None] + len(k) - len(q))
            mask = behind <= 0 if window is None else (behind <= 0) & (behind > -window)
            scores = torch.einsum("qhd,khd->hqk", q, k).masked_fill(~mask, -torch.inf)
            parts.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v))
            assert len(q) <= call.longest_queries and len(k) <= call.longest_keys
        return torch.cat(parts)

    return kernel


def results(attend, queries: int, batch: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = [(queries, batch, HEADS), (LENGTH, batch, KEY_VALUE_HEADS), (LENGTH, batch, KEY_VALUE_HEADS)]
    inputs = [torch.randn(*shape, CHANNELS, dtype=torch.float64).mul_(0.5).requires_grad_() for shape in shapes]
    attended = attend(*inputs)
    return [attended, *torch.autograd.grad(attended.sin().sum(), inputs)]


def check(keys: VisibleKeys, window: int | None, calls: int) -> None:
    """Results and gradients of tokens as the reference has them, in fp64: 1e-10; padding may see more."""
    planned = packed_calls(keys)
    assert planned is not None and len(planned) == calls
    queries, batch = keys.segments.shape[1], keys.segments.shape[0]
    tokens = (keys.segments > 0).t()

    def of_tokens(plan):
        return lambda *states: torch.where(tokens[..., None], plan.attend(*states), 0.0)

    mine, expected = (
        results(of_tokens(plan), queries, batch)
        for plan in (PackedPlan(kernel_of(window), planned), ReferencePlan(keys))
    )
    for ours, reference in zip(mine, expected, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("window", [None, 17])
@pytest.mark.parametrize("lengths", ROWS.values(), ids=ROWS)
def test_one_call_serves_all_documents_of_a_rank(lengths: list[list[int]], window: int | None) -> None:
    check(visible(MaskRule(window), lengths), window, calls=1)


@pytest.mark.parametrize("window", [None, 17])
@pytest.mark.parametrize(("rank", "calls"), [(0, 2), (1, 1)])  # the second rank's halves are neighbours
def test_zigzag_halves_are_calls_of_their_own(rank: int, calls: int, window: int | None) -> None:
    held = cp_token_index(LENGTH, 2, rank, None, "zigzag")
    check(visible(MaskRule(window), [[96]], held), window, calls)


@pytest.mark.parametrize("rank", [0, 1])
def test_contiguous_parts_of_packs_are_one_call(rank: int) -> None:
    held = cp_token_index(LENGTH, 2, rank, (0, 40, 60, 96), "contiguous")
    check(visible(MaskRule(None), [[40, 20, 36]], held), None, calls=1)


def test_many_cut_documents_are_left_to_another_kernel() -> None:
    starts = tuple(range(0, LENGTH + 1, 8))
    held = cp_token_index(LENGTH, 2, 0, starts, "zigzag")
    assert len(starts) - 1 > MOST_CALLS
    assert packed_calls(visible(MaskRule(None), [[8] * (LENGTH // 8)], held)) is None

"""The layout of a pack over context-parallel ranks is chosen by a cost that counts what really moves and computes."""

import pytest

from mimo_gemma4.config import ModelConfig
from mimo_gemma4.config.presets import load_model_config
from mimo_gemma4.distributed.cp_cost import AttentionCosts, cheaper_layout, halo_keys, predicted_seconds
from mimo_gemma4.language.config import Gemma4TextConfig
from mimo_gemma4.partition import CpLayout, cp_token_index

WINDOW = 6
PACKS = [[0, 64], [0, 16, 32, 48, 64], [0, 8, 56, 64], [0, 32, 64, 96, 128]]


def spans_of(positions: list[int], start: int, end: int) -> list[tuple[int, int]]:
    """Runs of consecutive positions inside a segment, counted from its start."""
    inside = sorted(p - start for p in positions if start <= p < end)
    spans: list[list[int]] = []
    for position in inside:
        if spans and spans[-1][1] == position:
            spans[-1][1] += 1
        else:
            spans.append([position, position + 1])
    return [(begin, stop) for begin, stop in spans]


def seen_elsewhere(positions: list[int], starts: list[int]) -> int:
    """By definition: keys that a rank's queries see through the window and that it does not hold."""
    mine, needed = set(positions), set()
    for start, end in zip(starts, starts[1:], strict=False):
        for query in (p for p in positions if start <= p < end):
            needed |= set(range(max(start, query - WINDOW + 1), query + 1))
    return len(needed - mine)


@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
@pytest.mark.parametrize("cp", [2, 4])
@pytest.mark.parametrize("starts", PACKS)
def test_predicted_halo_is_the_set_of_keys_held_elsewhere(starts: list[int], cp: int, layout: CpLayout) -> None:
    halo_only = AttentionCosts(full_pair=0.0, sliding_pair=0.0, halo_key=1.0, window=WINDOW)
    expected = []
    for rank in range(cp):
        positions = cp_token_index(starts[-1], cp, rank, starts, layout).tolist()
        expected.append(seen_elsewhere(positions, starts))
        segments = list(zip(starts, starts[1:], strict=False))
        assert sum(halo_keys(spans_of(positions, *segment), WINDOW) for segment in segments) == expected[-1]
    assert predicted_seconds(halo_only, starts, cp, layout) == max(expected)


@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
@pytest.mark.parametrize("starts", PACKS)
def test_predicted_work_is_the_pairs_of_the_slowest_rank(starts: list[int], layout: CpLayout) -> None:
    pairs_only = AttentionCosts(full_pair=1.0, sliding_pair=1000.0, halo_key=0.0, window=WINDOW)
    work = []
    for rank in range(4):
        full = sliding = 0
        for position in cp_token_index(starts[-1], 4, rank, starts, layout).tolist():
            seen = position - max(start for start in starts if start <= position) + 1
            full, sliding = full + seen, sliding + min(seen, WINDOW)
        work.append(full + 1000 * sliding)
    assert predicted_seconds(pairs_only, starts, 4, layout) == max(work)


@pytest.mark.parametrize("preset", ["gemma4_e4b", "gemma4_31b"])
def test_one_long_document_is_cut_zigzag_and_many_short_ones_stay_whole(preset: str) -> None:
    costs = AttentionCosts.of(Gemma4TextConfig.from_hf(load_model_config(ModelConfig(preset=preset))), tp=1)
    assert cheaper_layout(costs, [0, 65536], 8) == "zigzag"
    assert cheaper_layout(costs, list(range(0, 65537, 512)), 8) == "contiguous"

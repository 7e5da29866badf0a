"""Chooses the context-parallel layout of a pack by the predicted seconds of its slowest rank, from segment lengths.

Zigzag balances the causal work within every segment but cuts each one over all ranks, so that every chunk needs keys
from others. Contiguous parts keep short segments whole on one rank, but give the end of a long one to a single rank.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mimo_gemma4.flops import TextShape, causal_pairs
from mimo_gemma4.partition import CpLayout

ATTENTION_FLOPS = 1.5e14
"""Operations per second of attention kernels on one GPU (an H200 with block-sparse masks, forward and backward)."""
LINK_BYTES = 3.0e11
"""Bytes per second from one rank to another (NVLink of an H200)."""
Span = tuple[int, int]
"""Positions [begin, end) of a segment."""


@dataclass(frozen=True)
class AttentionCosts:
    """Seconds that the attention of all layers costs one rank, forward and backward."""

    full_pair: float
    """Per (query, key) pair of the full layers."""
    sliding_pair: float
    """Per pair of the sliding layers."""
    halo_key: float
    """Per key and value fetched for the sliding layers, with their gradients sent back."""
    window: int
    """Keys that a query of a sliding layer sees, itself included."""

    @classmethod
    def of(cls, text: TextShape, tp: int) -> "AttentionCosts":
        """For a model whose heads are shared by `tp` ranks, with bf16 keys and values."""
        pair = {"full_attention": 0.0, "sliding_attention": 0.0}
        halo_bytes = 0.0
        for layer in text.layers:
            pair[layer.attention] += 12.0 * max(1, text.num_attention_heads // tp) * layer.head_dim
            if layer.attention == "sliding_attention" and layer.owns_key_values:
                tensors = 2 if layer.has_value_projection else 1
                halo_bytes += 2 * tensors * 2 * max(1, layer.num_key_value_heads // tp) * layer.head_dim
        return cls(
            full_pair=pair["full_attention"] / ATTENTION_FLOPS,
            sliding_pair=pair["sliding_attention"] / ATTENTION_FLOPS,
            halo_key=halo_bytes / LINK_BYTES,
            window=text.sliding_window,
        )


def cheaper_layout(costs: AttentionCosts, segment_starts: Sequence[int], cp_size: int) -> CpLayout:
    """The layout whose slowest rank is predicted to take less time for this pack; zigzag where they are equal."""
    zigzag, contiguous = (
        predicted_seconds(costs, segment_starts, cp_size, layout) for layout in ("zigzag", "contiguous")
    )
    return "contiguous" if contiguous < zigzag else "zigzag"


def predicted_seconds(costs: AttentionCosts, segment_starts: Sequence[int], cp_size: int, layout: CpLayout) -> float:
    """Seconds that the slowest rank spends on attention and halos, without the costs that both layouts share."""
    return max(
        sum(_segment_seconds(costs, spans) for spans in _spans(segment_starts, cp_size, rank, layout))
        for rank in range(cp_size)
    )


def halo_keys(spans: Sequence[Span], window: int) -> int:
    """Keys of other ranks in the windows of the queries at these ascending spans of one segment."""
    keys, known_to = 0, 0  # keys below `known_to` are local, or were counted for an earlier span
    for begin, end in spans:
        keys += begin - max(begin - (window - 1), known_to) if begin > known_to else 0
        known_to = end
    return keys


def _segment_seconds(costs: AttentionCosts, spans: Sequence[Span]) -> float:
    full = sum(causal_pairs(end, end) - causal_pairs(begin, begin) for begin, end in spans)
    sliding = sum(causal_pairs(end, costs.window) - causal_pairs(begin, costs.window) for begin, end in spans)
    return full * costs.full_pair + sliding * costs.sliding_pair + halo_keys(spans, costs.window) * costs.halo_key


def _spans(segment_starts: Sequence[int], cp_size: int, rank: int, layout: CpLayout) -> Iterator[tuple[Span, ...]]:
    """The spans of every segment that a rank holds, in positions of the segment."""
    share = segment_starts[-1] // cp_size
    for start, end in zip(segment_starts, segment_starts[1:], strict=False):
        if layout == "zigzag":
            chunk = (end - start) // (2 * cp_size)
            low, high = rank * chunk, (2 * cp_size - 1 - rank) * chunk
            yield ((low, low + chunk), (high, high + chunk))
        else:
            begin, stop = max(start, rank * share), min(end, (rank + 1) * share)
            if begin < stop:
                yield ((begin - start, stop - start),)

"""Attention as packed causal sequences, the form that the fastest kernels take.

A microbatch is cut into stretches: consecutive queries of one segment, the last of which sees the last key of one run
of keys, the one before it one key less, and so on. A kernel takes many stretches in one call where their runs of keys
follow one another. That is one call without context parallelism, whatever the number of documents; a zigzag cut takes
one for each half of a document, because both halves see its first keys.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from mimo_gemma4.language.attention_context import VisibleKeys

MOST_CALLS = 8
"""Calls up to which they are worth it: FlexAttention serves many short stretches in one."""


@dataclass(frozen=True)
class PackedCall:
    """Stretches that a kernel takes at once; the n-th has its own queries and keys."""

    queries: slice
    """Of the flattened queries [B * S/cp]."""
    keys: slice
    """Of the flattened keys [B * K]."""
    query_ends: torch.Tensor
    """`cu_seqlens` of the queries: int32 [stretches + 1] on the device."""
    key_ends: torch.Tensor
    """`cu_seqlens` of the keys: int32 [stretches + 1] on the device."""
    longest_queries: int
    longest_keys: int


PackedKernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, PackedCall], torch.Tensor]
"""Query [T, heads, D] over key and value [K, key/value heads, D] (heads local) → [T, heads, D], causal from the end."""


class PackedPlan:
    """The calls of one attention type in one microbatch."""

    def __init__(self, kernel: PackedKernel, calls: Sequence[PackedCall]) -> None:
        """`kernel` applies the window, if there is one; `calls` cover all queries in order."""
        self.kernel, self.calls = kernel, calls

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attend as `AttentionPlan` says."""
        length, batch = query.shape[:2]
        query, key, value = (_flattened(states) for states in (query, key, value))  # [B * length, heads, D]
        parts = [self.kernel(query[call.queries], key[call.keys], value[call.keys], call) for call in self.calls]
        attended = parts[0] if len(parts) == 1 else torch.cat(parts)
        return attended.unflatten(0, (batch, length)).transpose(0, 1).flatten(2)


def packed_calls(keys: VisibleKeys) -> list[PackedCall] | None:
    """The calls of a microbatch, planned on the host; None where there would be too many."""
    stretches = _stretches(keys)
    bounds = [0]
    for number in range(1, len(stretches)):
        if stretches[number].first_key != stretches[number - 1].end_key:
            bounds.append(number)
    if len(bounds) > MOST_CALLS:
        return None
    bounds.append(len(stretches))
    return [_call(stretches[begin:end], keys.runs.device) for begin, end in zip(bounds, bounds[1:], strict=False)]


@dataclass(frozen=True)
class _Stretch:
    """Numbers of the first query and key, and behind the last, in the flattened microbatch."""

    first_query: int
    end_query: int
    first_key: int
    end_key: int


def stretch_begins(keys: VisibleKeys) -> torch.Tensor:
    """Whether a stretch begins at each query: bool [B, S/cp] on the host.

    Padding continues the segment before it: no token sees what padding sees, and it sees what comes earlier.
    """
    index = torch.arange(keys.segments.shape[1]).expand_as(keys.segments)
    segments = keys.segments.gather(1, torch.where(keys.segments > 0, index, 0).cummax(dim=1).values)
    begins = torch.ones_like(segments, dtype=torch.bool)
    begins[:, 1:] = (segments.diff(dim=1) != 0) | (keys.last.diff(dim=1) != 1)
    return begins


def _stretches(keys: VisibleKeys) -> list[_Stretch]:
    batch, length = keys.segments.shape
    first_queries = stretch_begins(keys).flatten().nonzero().squeeze(1)
    end_queries = torch.cat([first_queries[1:], torch.tensor([batch * length])])
    key_of_sequence = (torch.arange(batch) * keys.count)[:, None]
    first_keys = (keys.first + key_of_sequence).flatten()[first_queries]
    end_keys = (keys.last + key_of_sequence).flatten()[end_queries - 1] + 1
    columns = (part.tolist() for part in (first_queries, end_queries, first_keys, end_keys))
    return [_Stretch(*ends) for ends in zip(*columns, strict=True)]


def _call(stretches: Sequence[_Stretch], device: torch.device) -> PackedCall:
    first, last = stretches[0], stretches[-1]
    queries = [stretch.end_query - stretch.first_query for stretch in stretches]
    keys = [stretch.end_key - stretch.first_key for stretch in stretches]
    return PackedCall(
        slice(first.first_query, last.end_query),
        slice(first.first_key, last.end_key),
        _ends(queries, device),
        _ends(keys, device),
        max(queries),
        max(keys),
    )


def _ends(lengths: Sequence[int], device: torch.device) -> torch.Tensor:
    """`cu_seqlens` of lengths, copied to the device without waiting for it."""
    ends = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    return ends.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else ends


def _flattened(states: torch.Tensor) -> torch.Tensor:
    """[length, B, heads, D] as [B * length, heads, D]; no copy where B is 1."""
    return states.transpose(0, 1).flatten(0, 1)

"""Block-sparse attention by FlexAttention: only blocks that some query sees are computed, on CUDA.

The block structure follows from the runs of keys that queries see, by a few operations on tensors of block numbers; no
mask over all pairs is built and nothing waits for the device.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch._dynamo import config as dynamo
from torch.fx.experimental import _config as symbolic_shapes
from torch.nn.attention.flex_attention import BlockMask, FlexKernelOptions, flex_attention

from mimo_gemma4.language.attention_context import VisibleKeys

BLOCK = 128
"""Queries, and keys, per block of the sparsity structure; kernels cut it into tiles."""
PROGRAMS = 64
"""Most programs that a kernel is compiled to. One sequence or several, one key head or several, one block of queries or
keys or several, with gradients and without: each combination that occurs is a program, whatever the lengths."""


class FlexPlan:
    """The block mask of one attention type in one microbatch."""

    def __init__(self, keys: VisibleKeys) -> None:
        """Build the block mask on the device."""
        self.block_mask = block_mask(keys.runs[0], keys.runs[1], keys.count)

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attend as `AttentionPlan` says."""
        kernel = _compiled(_kernel(query.shape[3] * query.element_size()))
        query, key, value = (states.permute(1, 2, 0, 3) for states in (query, key, value))
        # Sequence lengths that happen to be equal at first would otherwise be taken for one: a compilation per length.
        with symbolic_shapes.patch(use_duck_shape=False):  # type: ignore[attr-defined]
            attended = kernel(query, key, value, self.block_mask)
        return attended.permute(2, 0, 1, 3).flatten(2)


def block_mask(first: torch.Tensor, last: torch.Tensor, count: int) -> BlockMask:
    """The blocks of queries over `count` keys, of which each query sees those from `first` to `last`, int32 [B, S/cp].

    A block is full if all its queries see all its keys, and left out if none of its queries sees any of its keys; in
    other blocks the kernel compares every pair with `first` and `last`. A query that sees nothing has `first` = `count`
    and `last` = -1.
    """
    length = first.shape[1]
    key_blocks = -(-count // BLOCK)
    lowest, highest = _per_block(first, count).amin(-1), _per_block(last, -1).amax(-1)
    begin, end = lowest // BLOCK, highest // BLOCK + 1
    # Queries that fill up the last block see nothing here, so that block is never full.
    full_begin = -(-_per_block(first, count).amax(-1) // BLOCK)
    full_end = (_per_block(last, -1).amin(-1) + 1) // BLOCK
    full = (full_end - full_begin).clamp(min=0)
    full_begin = torch.where(full > 0, full_begin, begin)

    offset = torch.arange(key_blocks, dtype=torch.int32, device=first.device)
    full_indices = full_begin[..., None] + offset
    partial_indices = begin[..., None] + offset
    partial_indices = partial_indices + full[..., None] * (partial_indices >= full_begin[..., None])
    partial = (end - begin - full).clamp(min=0)

    def sees(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (key >= first[batch, query]) & (key <= last[batch, query])

    return BlockMask.from_kv_blocks(
        partial[:, None],
        partial_indices.clamp(max=key_blocks - 1)[:, None],
        full[:, None],
        full_indices.clamp(max=key_blocks - 1)[:, None],
        BLOCK_SIZE=BLOCK,
        mask_mod=sees,
        seq_lengths=(length, count),
    )


def _per_block(ends: torch.Tensor, filler: int) -> torch.Tensor:
    """[B, S/cp] as [B, blocks, BLOCK], filled up."""
    missing = -ends.shape[1] % BLOCK
    return torch.nn.functional.pad(ends, (0, missing), value=filler).unflatten(1, (-1, BLOCK))


# Tiles that fit into the shared memory of a Hopper SM, forward and backward. The sizes are literals because dynamic
# shapes turn integers from anywhere else into symbols, which tiles cannot be.


def _tiles_of_64(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: BlockMask) -> torch.Tensor:
    options: FlexKernelOptions = {
        "BLOCK_M": 64,
        "BLOCK_N": 64,
        "BLOCK_M1": 64,
        "BLOCK_N1": 64,
        "BLOCK_M2": 64,
        "BLOCK_N2": 64,
    }
    return flex_attention(query, key, value, block_mask=mask, scale=1.0, enable_gqa=True, kernel_options=options)


def _tiles_of_32(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: BlockMask) -> torch.Tensor:
    options: FlexKernelOptions = {
        "BLOCK_M": 32,
        "BLOCK_N": 32,
        "BLOCK_M1": 32,
        "BLOCK_N1": 32,
        "BLOCK_M2": 32,
        "BLOCK_N2": 32,
    }
    return flex_attention(query, key, value, block_mask=mask, scale=1.0, enable_gqa=True, kernel_options=options)


def _tiles_of_16(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: BlockMask) -> torch.Tensor:
    options: FlexKernelOptions = {
        "BLOCK_M": 16,
        "BLOCK_N": 16,
        "BLOCK_M1": 16,
        "BLOCK_N1": 16,
        "BLOCK_M2": 16,
        "BLOCK_N2": 16,
    }
    return flex_attention(query, key, value, block_mask=mask, scale=1.0, enable_gqa=True, kernel_options=options)


Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, BlockMask], torch.Tensor]


def _kernel(bytes_per_head: int) -> Kernel:
    """The largest tiles for heads of so many bytes: 512 are 256 channels of bf16, 2048 are 512 channels of fp32."""
    return _tiles_of_64 if bytes_per_head <= 512 else _tiles_of_32 if bytes_per_head <= 1024 else _tiles_of_16


@cache
def _compiled(kernel: Kernel) -> Kernel:
    # Dynamo would run what it meets beyond its limit of 8 uncompiled, with all scores in memory.
    dynamo.recompile_limit = max(PROGRAMS, dynamo.recompile_limit)
    return torch.compile(kernel, dynamic=True)

"""The one place that knows how a sequence is cut over context-parallel and sequence-parallel ranks.

Context parallelism (CP) cuts every tensor along the sequence, in one of two layouts:

- `zigzag`: the sequence, or each padded segment of a THD pack, is cut into `2 * cp` chunks and rank `r` holds chunks
  `r` and `2 * cp - 1 - r`, in that order, so that causal attention costs every rank the same;
- `contiguous`: rank `r` holds the `r`-th of `cp` equal parts of the sequence, or of the whole pack, so that most short
  segments lie on one rank and need no keys from another.

Sequence parallelism (SP) then scatters the embeddings of the local tokens contiguously over the tensor-parallel ranks.
Labels and loss masks are never scattered, because the loss runs after the gather.

Everything else asks `token_index`, or `cp_token_index` for other ranks, which tokens are whose.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams

from mimo_gemma4.errors import LayoutError

CpLayout = Literal["zigzag", "contiguous"]
"""How context-parallel ranks share a sequence."""


@dataclass(frozen=True)
class PartitionConfig:
    """What the adapter needs to know about the language module's grid."""

    sequence_parallel: bool
    """Whether the embeddings are also scattered over `tp_group`."""
    tp_group: dist.ProcessGroup | None
    """Tensor-parallel group; None stands for a single rank."""
    cp_group: dist.ProcessGroup | None
    """Context-parallel group; None stands for a single rank."""
    max_seq_len: int
    """`data.seq_length`: the only sequence length that fits the buffers of `tp_comm_overlap`."""
    tp_comm_overlap: bool = False
    """Whether Transformer Engine's userbuffers overlap tensor-parallel communication."""
    kv_format: Literal["sbhd", "thd"] = "sbhd"
    """`sbhd` for padded batches [S, B, H], `thd` for packs: one sequence with `PackedSeqParams`."""

    @property
    def cp_size(self) -> int:
        """Number of context-parallel ranks."""
        return 1 if self.cp_group is None else self.cp_group.size()

    @property
    def tp_size(self) -> int:
        """Number of ranks over which embeddings are scattered: 1 without sequence parallelism."""
        return self.tp_group.size() if self.sequence_parallel and self.tp_group is not None else 1


def sequence_multiple(cp_size: int, tp_size: int, layout: CpLayout = "zigzag") -> int:
    """What a padded sequence's length must be a multiple of; `tp_size` is 1 without sequence parallelism."""
    return segment_multiple(cp_size) * tp_size if layout == "zigzag" else cp_size * tp_size


def segment_multiple(cp_size: int, layout: CpLayout = "zigzag") -> int:
    """What the padded length of each segment of a THD pack must be a multiple of."""
    return 2 * cp_size if cp_size > 1 and layout == "zigzag" else 1


def pack_multiple(cp_size: int, tp_size: int, layout: CpLayout = "zigzag") -> int:
    """What the total length of a THD pack must be a multiple of; `tp_size` is 1 without sequence parallelism."""
    return cp_size * (math.lcm(2, tp_size) if cp_size > 1 and layout == "zigzag" else tp_size)


def cp_token_index(
    seq_len: int,
    cp_size: int,
    cp_rank: int,
    segment_starts: Sequence[int] | None = None,
    layout: CpLayout = "zigzag",
) -> torch.Tensor:
    """Global positions that a context-parallel rank holds, in its local order.

    Args:
        seq_len: length S of the whole sequence, or of the whole pack.
        cp_size: number of context-parallel ranks.
        cp_rank: number of the rank among them.
        segment_starts: cumulative padded segment lengths of a THD pack, from 0 to S; None for one sequence.
        layout: how the ranks share the sequence.

    Returns:
        LongTensor [S / cp] on the host.
    """
    share = seq_len // cp_size
    if cp_size == 1 or layout == "contiguous":
        return torch.arange(cp_rank * share, (cp_rank + 1) * share)
    starts = torch.tensor([0, seq_len] if segment_starts is None else list(segment_starts))
    chunks = (starts[1:] - starts[:-1]) // (2 * cp_size)
    local_starts = starts // cp_size
    local = torch.arange(share)
    segment = torch.searchsorted(local_starts, local, right=True) - 1
    offset, chunk = local - local_starts[segment], chunks[segment]
    chunk_number = torch.where(offset < chunk, cp_rank, 2 * cp_size - 1 - cp_rank)
    return starts[segment] + chunk_number * chunk + offset % chunk.clamp(min=1)


class PartitionAdapter:
    """Cuts the inputs of the language module for this rank's context-parallel and sequence-parallel coordinates."""

    def __init__(self, config: PartitionConfig):
        """Use the groups of `config`; no other is looked up."""
        self.config = config

    def token_index(
        self,
        seq_len: int,
        packed_seq_params: PackedSeqParams | Sequence[int] | None = None,
        layout: CpLayout = "zigzag",
    ) -> torch.Tensor:
        """The global positions that this CP rank holds, in its local order: LongTensor [S / cp] on the host.

        Args:
            seq_len: length S of the whole sequence, or of the whole pack.
            packed_seq_params: of a pack, its `PackedSeqParams` (with boundaries on the host: reading them from a GPU
                waits for it), or its boundaries alone: cumulative padded segment lengths from 0 to `seq_len`.
            layout: how context-parallel ranks share the sequence.

        Raises:
            LayoutError: the sequence, or a segment of the pack, cannot be cut evenly, or does not fit
                `tp_comm_overlap`.
        """
        starts = self._segment_starts(packed_seq_params)
        if starts is None:
            self._check_sequence(seq_len, layout)
        else:
            self._check_pack(seq_len, starts, layout)
        rank = 0 if self.config.cp_group is None else self.config.cp_group.rank()
        return cp_token_index(seq_len, self.config.cp_size, rank, starts, layout)

    def cut(self, tokens: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Labels, loss mask, token ids, position ids or group ids [B, S] → [B, S/cp] (local), at `token_index`."""
        return tokens if self.config.cp_size == 1 else tokens.index_select(1, index)

    def shard(
        self,
        embeddings: torch.Tensor | None,
        labels: torch.Tensor | None,
        loss_mask: torch.Tensor | None,
        packed_seq_params: PackedSeqParams | None = None,
        layout: CpLayout = "zigzag",
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, PackedSeqParams | None]:
        """Cut whole tensors to this rank's part; differentiable and bit-exact in backward.

        For callers that hold the embeddings of whole sequences. Training does not call it: no rank puts a whole
        sequence together there; each cuts ids and labels by `token_index` and embeds its own tokens only.

        Args:
            embeddings: [S, B, H], or None on pipeline stages other than the first.
            labels: [B, S] or None.
            loss_mask: [B, S] or None.
            packed_seq_params: segment boundaries of a THD pack (then B is 1), or None.
            layout: how context-parallel ranks share the sequence.

        Returns:
            embeddings [S/(cp*tp), B, H] (local), labels and loss_mask [B, S/cp] (local), and `packed_seq_params` as
            given, with its global boundaries. Without CP and SP everything is returned unchanged, not copied.

        Raises:
            LayoutError: a length cannot be cut evenly, or does not fit `tp_comm_overlap`.
        """
        if self.config.cp_size > 1 or self.config.tp_size > 1:
            seq_len = self._common_length(embeddings, labels, loss_mask)
            if seq_len is not None:
                index = self.token_index(seq_len, packed_seq_params, layout)
                embeddings, labels, loss_mask = self._cut(embeddings, labels, loss_mask, index)
        return embeddings, labels, loss_mask, packed_seq_params

    def _cut(
        self,
        embeddings: torch.Tensor | None,
        labels: torch.Tensor | None,
        loss_mask: torch.Tensor | None,
        index: torch.Tensor,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        if self.config.cp_size > 1:
            present = next(t for t in (embeddings, labels, loss_mask) if t is not None)
            index = index.to(present.device, non_blocking=True)
            embeddings = None if embeddings is None else embeddings.index_select(0, index)
            labels = None if labels is None else self.cut(labels, index)
            loss_mask = None if loss_mask is None else self.cut(loss_mask, index)
        if self.config.tp_size > 1 and embeddings is not None:
            embeddings = _Scatter.apply(embeddings, self.config.tp_group)
        return embeddings, labels, loss_mask

    def _common_length(self, *tensors: torch.Tensor | None) -> int | None:
        embeddings, *others = tensors
        lengths = ([] if embeddings is None else [embeddings.shape[0]]) + [t.shape[1] for t in others if t is not None]
        if len(set(lengths)) > 1:
            raise LayoutError(f"embeddings [S, B, H], labels and loss_mask [B, S] disagree on S: {lengths}")
        return lengths[0] if lengths else None

    def _segment_starts(self, packed_seq_params: PackedSeqParams | Sequence[int] | None) -> list[int] | None:
        if isinstance(packed_seq_params, Sequence):
            return list(packed_seq_params)
        if packed_seq_params is None or packed_seq_params.qkv_format in (None, "sbhd"):
            if self.config.kv_format == "thd":
                raise LayoutError("kv_format is thd, but packed_seq_params with qkv_format thd is missing")
            return None
        starts = packed_seq_params.cu_seqlens_q_padded
        if starts is None:
            starts = packed_seq_params.cu_seqlens_q
        if starts is None:
            raise LayoutError("packed_seq_params has neither cu_seqlens_q_padded nor cu_seqlens_q")
        return [int(start) for start in starts.tolist()]

    def _check_sequence(self, seq_len: int, layout: CpLayout) -> None:
        cp, tp = self.config.cp_size, self.config.tp_size
        multiple = sequence_multiple(cp, tp, layout)
        if seq_len % multiple:
            of_cp = [] if cp == 1 else ["2*cp"] if layout == "zigzag" else ["cp"]
            factor = "*".join(of_cp + (["tp"] if tp > 1 else []))
            raise LayoutError(
                f"sequence length {seq_len} is not a multiple of {factor} = {multiple} (cp={cp}, tp={tp}); "
                f"the next length that is: {math.ceil(seq_len / multiple) * multiple}"
            )
        self._check_overlap(seq_len)

    def _check_overlap(self, seq_len: int) -> None:
        if self.config.tp_comm_overlap and self.config.tp_size > 1 and seq_len != self.config.max_seq_len:
            raise LayoutError(
                f"tp_comm_overlap needs sequences of exactly max_seq_len = {self.config.max_seq_len} tokens, "
                f"got {seq_len}"
            )

    def _check_pack(self, seq_len: int, starts: list[int], layout: CpLayout) -> None:
        cp, tp = self.config.cp_size, self.config.tp_size
        if starts[0] != 0 or starts[-1] != seq_len:
            raise LayoutError(f"cu_seqlens spans {starts[0]} to {starts[-1]}, but the pack holds {seq_len} tokens")
        multiple = segment_multiple(cp, layout)
        for number, (start, end) in enumerate(zip(starts, starts[1:], strict=False)):
            if (end - start) % multiple:
                raise LayoutError(
                    f"segment {number} of the pack has {end - start} positions, not a multiple of 2*cp = {multiple} "
                    f"(cp={cp}); pad it to {math.ceil((end - start) / multiple) * multiple}"
                )
        multiple = pack_multiple(cp, tp, layout)
        if seq_len % multiple:
            raise LayoutError(
                f"the pack has {seq_len} positions, not a multiple of {multiple} (cp={cp}, tp={tp}, sequence_parallel="
                f"{self.config.sequence_parallel}); add a masked tail segment up to "
                f"{math.ceil(seq_len / multiple) * multiple}"
            )
        self._check_overlap(seq_len)


class _Scatter(torch.autograd.Function):
    """Keep this rank's contiguous share of dimension 0; the backward pass gathers all ranks' gradients bit for bit."""

    @staticmethod
    def forward(ctx: Any, whole: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return whole.chunk(group.size())[group.rank()].clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        local = gradients[0].contiguous()
        whole = local.new_empty(local.shape[0] * ctx.group.size(), *local.shape[1:])
        dist.all_gather_into_tensor(whole, local, group=ctx.group)
        return whole, None

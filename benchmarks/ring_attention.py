"""The peer of `context_parallel.py`: every layer passes whole key/value chunks around a ring and merges the results.

Written from the method's description: in step h a rank attends to the chunk of the rank h places before it, while that
chunk is already on its way to the next rank; partial results are merged by their log-sum-exp. Shared keys and values go
round again in every layer that uses them. The kernel is the project's: FlexAttention over visible blocks.
"""

from collections.abc import Sequence
from functools import cache

import torch
import torch.distributed as dist
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, FlexKernelOptions, flex_attention

from mimo_gemma4.language.attention_context import MaskRule, visible_runs
from mimo_gemma4.language.flex_attention import block_mask
from mimo_gemma4.language.key_exchange import Pending, States, finish_exchange, start_exchange


class RingStep:
    """A `KeyExchange` that brings the previous rank's chunk and hands on one's own."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        """Neighbours in `group`."""
        self.group = group

    def send(self, states: States) -> Pending:
        """Launch the chunk to the next rank."""
        return self._shift(torch.stack(states), 1)

    def assemble(self, states: States, received: torch.Tensor) -> States:
        """The previous rank's chunk."""
        return received.unbind()

    def send_back(self, gradients: States) -> tuple[States, Pending]:
        """Launch the chunk's gradient to the rank it came from."""
        nothing = gradients[0].new_zeros(()).expand_as(gradients[0])
        return tuple(nothing for _ in gradients), self._shift(torch.stack(gradients), -1)

    def add_returned(self, local: States, returned: torch.Tensor) -> States:
        """Gradient of one's own chunk from all later steps."""
        return returned.unbind()

    def _shift(self, packed: torch.Tensor, by: int) -> Pending:
        rank, ranks = self.group.rank(), self.group.size()
        rows = packed.shape[0]
        sends, receives = (
            [rows * (peer == other % ranks) for peer in range(ranks)] for other in (rank + by, rank - by)
        )
        received = torch.empty_like(packed)
        work = dist.all_to_all_single(received, packed, receives, sends, group=self.group, async_op=True)
        return Pending(received, packed, work)


class RingPlan:
    """An `AttentionPlan` over local keys and values, with one block mask per chunk."""

    def __init__(
        self,
        rule: MaskRule,
        segments: torch.Tensor,
        held: Sequence[torch.Tensor],
        group: dist.ProcessGroup,
        device: torch.device,
    ) -> None:
        """Masks for text `segments` [1, S] cut as `held` says."""
        self.ring = RingStep(group)
        rank, ranks = group.rank(), group.size()
        first, last = (ends[:, held[rank]].contiguous() for ends in visible_runs(rule, segments, None))
        self.masks = []
        for step in range(ranks):
            chunk = held[(rank - step) % ranks]
            begin, end = torch.searchsorted(chunk, first), torch.searchsorted(chunk, last, right=True) - 1
            nothing = begin > end
            runs = [begin.masked_fill(nothing, chunk.numel()), end.masked_fill(nothing, -1)]
            self.masks.append(block_mask(*(ends.int().to(device) for ends in runs), chunk.numel()))

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attend to every chunk in turn."""
        merged, total = None, None
        states: States = (key, value)
        flat_query = query.permute(1, 2, 0, 3)
        for step, mask in enumerate(self.masks):
            started = start_exchange(self.ring, states) if step + 1 < len(self.masks) else None
            partial, logits = _kernel(query)(flat_query, *(part.permute(1, 2, 0, 3) for part in states), mask)
            if merged is None:
                merged, total = partial.float(), logits
            else:
                both = torch.logaddexp(total, logits)
                merged = merged * (total - both).exp()[..., None] + partial * (logits - both).exp()[..., None]
                total = both
            if started is not None:
                states = finish_exchange(started)
        return merged.to(query.dtype).permute(2, 0, 1, 3).flatten(2)


def _tiles_of_64(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: BlockMask):
    tiles: FlexKernelOptions = {"BLOCK_M": 64, "BLOCK_N": 64}
    tiles |= {"BLOCK_M1": 64, "BLOCK_N1": 64, "BLOCK_M2": 64, "BLOCK_N2": 64}
    return _attend(query, key, value, mask, tiles)


def _tiles_of_32(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: BlockMask):
    tiles: FlexKernelOptions = {"BLOCK_M": 32, "BLOCK_N": 32}
    tiles |= {"BLOCK_M1": 32, "BLOCK_N1": 32, "BLOCK_M2": 32, "BLOCK_N2": 32}
    return _attend(query, key, value, mask, tiles)


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: BlockMask, tiles: FlexKernelOptions):
    attended, extra = flex_attention(
        query,
        key,
        value,
        block_mask=mask,
        scale=1.0,
        enable_gqa=True,
        kernel_options=tiles,
        return_aux=AuxRequest(lse=True),
    )
    return attended, extra.lse


def _dense(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: BlockMask):
    """What the kernels compute, for CPUs, on which FlexAttention has no backward pass."""
    key, value = (states.repeat_interleave(query.shape[1] // states.shape[1], dim=1) for states in (key, value))
    batch, row, column = (torch.arange(size) for size in (query.shape[0], query.shape[2], key.shape[2]))
    visible = mask.mask_mod(batch[:, None, None, None], torch.tensor(0), row[:, None], column)
    scores = (query.float() @ key.float().mT).masked_fill(~visible, -1e30)
    return scores.softmax(-1).to(value.dtype) @ value, scores.logsumexp(-1)


def _kernel(query: torch.Tensor):
    if not query.is_cuda:
        return _dense
    return _compiled(_tiles_of_64 if query.shape[3] * query.element_size() <= 512 else _tiles_of_32)


@cache
def _compiled(kernel):
    return torch.compile(kernel, dynamic=False)  # one length at a time is measured

"""The peer in `bridge.py`: soft tokens between grids by leaders and broadcasts, as megatron-core's MIMO moves them.

Written from a description of it. One rank of each lane, the leader, talks to the other lane's; each message is
announced by its shape, which every receiver's host reads before it makes room; and what a leader received it broadcasts
whole to the ranks of its lane. The way back mirrors the way there.
"""

import torch
import torch.distributed as dist

from mimo_gemma4.distributed.layout import ModuleGrid


class LeaderBridge:
    """One encoder lane and one language lane."""

    def __init__(self, source: ModuleGrid, target: ModuleGrid, dtype: torch.dtype, device: torch.device):
        """Choose the leaders and make the groups; collective over all ranks, whether or not they take part.

        Args:
            source: grid of the encoder, one lane.
            target: grid of the language model, one lane of one stage.
            dtype: of the soft tokens.
            device: where they live.
        """
        self.dtype, self.device, self.rank = dtype, device, dist.get_rank()
        self.source_leader, self.target_leader = source.ranks[-1], target.ranks[0]
        self.source_group, self.target_group = (
            dist.new_group(list(grid.ranks), group_desc=f"leader.{grid.name}") for grid in (source, target)
        )
        self.leaders = dist.new_group(sorted((self.source_leader, self.target_leader)), group_desc="leader.edge")
        self.sends, self.receives = self.rank in source, self.rank in target
        self.gathers = target.sequence_parallel and target.tp > 1

    def forward(self, soft_tokens: torch.Tensor | None) -> torch.Tensor | None:
        """All soft tokens [n, H] on every rank of the language lane, from the encoder's `soft_tokens`; None
        elsewhere."""
        received = self._hop(soft_tokens, self.source_leader, self.target_leader)
        return self._spread(received, self.target_leader, self.target_group) if self.receives else None

    def backward(self, gradient: torch.Tensor | None, positions: torch.Tensor | None) -> torch.Tensor | None:
        """The gradient [n, H] of all soft tokens on every rank of the encoder lane; None elsewhere.

        Args:
            gradient: of this language rank's embeddings [S/tp (local), H] under sequence parallelism, where the
                scatter's backward pass gathers them first; else of the soft tokens that `forward` gave.
            positions: with sequence parallelism, where the soft tokens are in the sequence.
        """
        if self.receives and self.gathers:
            assert gradient is not None and positions is not None
            whole = gradient.new_empty(len(gradient) * self.target_group.size(), gradient.shape[1])
            dist.all_gather_into_tensor(whole, gradient, group=self.target_group)
            gradient = whole.index_select(0, positions)
        received = self._hop(gradient, self.target_leader, self.source_leader)
        return self._spread(received, self.source_leader, self.source_group) if self.sends else None

    def _hop(self, soft_tokens: torch.Tensor | None, origin: int, destination: int) -> torch.Tensor | None:
        """Shape, then soft tokens, from one leader to the other; None on other ranks."""
        if self.rank == origin:
            assert soft_tokens is not None
            dist.isend(self._shape(soft_tokens), destination, group=self.leaders).wait()  # type: ignore[union-attr]
            dist.isend(soft_tokens, destination, group=self.leaders).wait()  # type: ignore[union-attr]
            return None
        if self.rank != destination:
            return None
        shape = torch.empty(2, dtype=torch.int64, device=self.device)
        dist.irecv(shape, origin, group=self.leaders).wait()  # type: ignore[union-attr]
        received = torch.empty(shape.tolist(), dtype=self.dtype, device=self.device)
        dist.irecv(received, origin, group=self.leaders).wait()  # type: ignore[union-attr]
        return received

    def _spread(self, soft_tokens: torch.Tensor | None, leader: int, group: dist.ProcessGroup) -> torch.Tensor:
        """Shape, then soft tokens, from the leader to all ranks of its lane."""
        if group.size() == 1:
            assert soft_tokens is not None
            return soft_tokens
        shape = (
            torch.empty(2, dtype=torch.int64, device=self.device) if soft_tokens is None else self._shape(soft_tokens)
        )
        dist.broadcast(shape, leader, group=group)
        if soft_tokens is None:
            soft_tokens = torch.empty(shape.tolist(), dtype=self.dtype, device=self.device)
        dist.broadcast(soft_tokens, leader, group=group)
        return soft_tokens

    def _shape(self, soft_tokens: torch.Tensor) -> torch.Tensor:
        return torch.tensor(soft_tokens.shape, dtype=torch.int64, device=self.device)

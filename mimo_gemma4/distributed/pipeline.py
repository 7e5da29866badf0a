"""Moves tensors between neighbouring pipeline stages. Both ends know every shape, so shapes are not sent."""

from collections.abc import Sequence

import torch
import torch.distributed as dist

from mimo_gemma4.distributed.layout import ModuleGrid
from mimo_gemma4.distributed.p2p import P2PChannel, PendingRecv

Shapes = Sequence[tuple[int, ...]]


class Direction:
    """One direction of a pipeline: batches of tensors from `source` to this rank and from this rank to `target`."""

    def __init__(
        self,
        group: dist.ProcessGroup,
        source: int | None,
        target: int | None,
        dtype: torch.dtype,
        device: torch.device,
    ):
        """Connect both ends.

        Args:
            group: the pipeline's ranks; nothing else may use it while tensors travel.
            source: global rank that sends to this rank, None at the beginning.
            target: global rank that this rank sends to, None at the end.
            dtype: element type of all tensors.
            device: device of all tensors.
        """
        self.channel = P2PChannel(group)
        self.source, self.target = source, target
        self.dtype, self.device = dtype, device

    def send(self, tensors: Sequence[torch.Tensor]) -> None:
        """Start sending; the tensors are kept until they have left."""
        assert self.target is not None
        self.channel.post([(self.target, tensor.detach().contiguous()) for tensor in tensors], [])

    def post_recv(self, shapes: Shapes) -> PendingRecv:
        """Allocate tensors of these shapes and start receiving them from `source`."""
        assert self.source is not None
        buffers = [torch.empty(shape, dtype=self.dtype, device=self.device) for shape in shapes]
        return self.channel.post([], [(self.source, buffer) for buffer in buffers])

    def drain(self) -> None:
        """Wait until everything has left."""
        self.channel.drain()


class Pipeline:
    """The two directions between a stage and its neighbours of the same lane."""

    def __init__(
        self,
        grid: ModuleGrid,
        rank: int,
        forward_group: dist.ProcessGroup,
        backward_group: dist.ProcessGroup,
        dtype: torch.dtype,
        device: torch.device,
    ):
        """Find this rank's neighbours.

        Args:
            grid: the module's grid.
            rank: this process's global rank.
            forward_group: ranks of this pipeline; carries activations.
            backward_group: the same ranks; carries gradients.
            dtype: element type of all tensors.
            device: device of all tensors.
        """
        at = grid.coordinate(rank)
        previous, following = (
            grid.rank_at(tp=at.tp, cp=at.cp, dp=at.dp, pp=pp) if 0 <= pp < grid.pp else None
            for pp in (at.pp - 1, at.pp + 1)
        )
        self.forward = Direction(forward_group, previous, following, dtype, device)
        self.backward = Direction(backward_group, following, previous, dtype, device)

    def drain(self) -> None:
        """Wait until everything has left."""
        self.forward.drain()
        self.backward.drain()

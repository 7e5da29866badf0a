"""Moves tensors between neighbouring pipeline stages; both ends know every shape, so nothing is announced."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from mimo_gemma4.layout import ModuleGrid

Shapes = Sequence[tuple[int, ...]]


@dataclass(frozen=True)
class Arrival:
    """Tensors on their way here."""

    tensors: list[torch.Tensor]
    works: list[dist.Work]

    def wait(self) -> list[torch.Tensor]:
        """The tensors. On a GPU the stream waits for them, not the host."""
        for work in self.works:
            work.wait()
        return self.tensors


class Channel:
    """One direction of a pipeline: batches of tensors from `source` to this rank and from this rank to `target`."""

    def __init__(
        self,
        group: dist.ProcessGroup,
        source: int | None,
        target: int | None,
        dtype: torch.dtype,
        device: torch.device,
    ):
        """Keep both ends.

        Args:
            group: the pipeline's ranks; nothing else may be under way on it while tensors travel.
            source: global rank that sends here, None at the beginning.
            target: global rank that this rank sends to, None at the end.
            dtype: of all tensors.
            device: where they live.
        """
        self.group, self.source, self.target, self.dtype, self.device = group, source, target, dtype, device
        self._leaving: list[tuple[list[dist.Work], list[torch.Tensor]]] = []

    def send(self, tensors: Sequence[torch.Tensor]) -> None:
        """Start sending; the tensors are kept until they have left."""
        assert self.target is not None
        self._leaving = [(works, kept) for works, kept in self._leaving if not all(w.is_completed() for w in works)]
        payload = [tensor.detach().contiguous() for tensor in tensors]
        operations = [dist.P2POp(dist.isend, tensor, self.target, self.group) for tensor in payload]
        self._leaving.append((dist.batch_isend_irecv(operations), payload))

    def expect(self, shapes: Shapes) -> Arrival:
        """Make room for what the source sends next, and start receiving it."""
        assert self.source is not None
        buffers = [torch.empty(shape, dtype=self.dtype, device=self.device) for shape in shapes]
        operations = [dist.P2POp(dist.irecv, buffer, self.source, self.group) for buffer in buffers]
        return Arrival(buffers, dist.batch_isend_irecv(operations))

    def drain(self) -> None:
        """Wait until everything has left."""
        for works, _ in self._leaving:
            for work in works:
                work.wait()
        self._leaving.clear()


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
            dtype: of what travels.
            device: where it lives.
        """
        at = grid.coordinate(rank)
        before, after = (
            grid.rank_at(tp=at.tp, cp=at.cp, dp=at.dp, pp=pp) if 0 <= pp < grid.pp else None
            for pp in (at.pp - 1, at.pp + 1)
        )
        self.forward = Channel(forward_group, before, after, dtype, device)
        self.backward = Channel(backward_group, after, before, dtype, device)

    def drain(self) -> None:
        """Wait until everything has left."""
        self.forward.drain()
        self.backward.drain()

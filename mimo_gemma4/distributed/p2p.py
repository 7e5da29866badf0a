"""Point-to-point messages in batches, without blocking the host of a GPU."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

Message = tuple[int, torch.Tensor]
"""Global rank of the peer, and the contiguous tensor that is sent to it or filled by it."""


@dataclass(frozen=True)
class PendingRecv:
    """Tensors that are being received."""

    tensors: list[torch.Tensor]
    works: list[dist.Work]
    """Handles to wait for."""

    def wait(self) -> list[torch.Tensor]:
        """The tensors. On a GPU the stream waits for them, not the host."""
        for work in self.works:
            work.wait()
        return self.tensors


class P2PChannel:
    """Sends and receives on a process group of its own, batch by batch; each travels once both ends have posted it."""

    def __init__(self, group: dist.ProcessGroup):
        """Use `group`, which nothing else may use while messages travel."""
        self.group = group
        self._leaving: list[tuple[list[dist.Work], list[torch.Tensor]]] = []

    def post(self, sends: Sequence[Message], recvs: Sequence[Message]) -> PendingRecv:
        """Start sending and receiving one batch. Sent tensors are kept until they have left; nothing waits for that."""
        self._leaving = [entry for entry in self._leaving if not all(work.is_completed() for work in entry[0])]
        operations = [dist.P2POp(dist.isend, tensor, peer, self.group) for peer, tensor in sends]
        operations += [dist.P2POp(dist.irecv, tensor, peer, self.group) for peer, tensor in recvs]
        works = dist.batch_isend_irecv(operations) if operations else []
        # gloo gives a handle for each operation, NCCL one for the batch.
        separate = len(works) == len(operations)
        if sends:
            self._leaving.append((works[: len(sends)] if separate else works, [tensor for _, tensor in sends]))
        receiving = works[len(sends) :] if separate else works
        return PendingRecv([tensor for _, tensor in recvs], receiving if recvs else [])

    def drain(self) -> None:
        """Wait until everything has left, then release it. On a GPU the stream waits, not the host."""
        for works, _ in self._leaving:
            for work in works:
                work.wait()
        self._leaving.clear()

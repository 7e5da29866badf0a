"""Notes what travels between ranks: every operation that torch.distributed carries out, on gloo and NCCL alike."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass(frozen=True)
class Message:
    """One operation of torch.distributed on this rank."""

    operation: str
    """Its name among torch's `c10d` operators: `send`, `recv_`, `allreduce_`, `broadcast_`, …"""
    group: str
    """Description of the process group."""
    peer: int | None
    """Number in the group of the other rank of a `send` or `recv_`."""
    dtype: torch.dtype
    shape: tuple[int, ...]
    """Of the largest tensor that takes part."""
    received: float
    """Bytes that reach this rank, by an algorithm that moves no byte in vain."""


class Traffic(TorchDispatchMode):
    """Fills `messages` while it is active, in this thread and in the backward passes that it starts."""

    def __init__(self) -> None:
        """Start with nothing noted."""
        super().__init__()
        self.messages: list[Message] = []

    @property
    def received(self) -> float:
        """Bytes that reached this rank."""
        return sum(message.received for message in self.messages)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Run the operator; note it where it is one of torch.distributed."""
        if getattr(func, "namespace", None) == "c10d":
            self.messages.append(_message(func, args))
        return func(*args, **(kwargs or {}))


def _message(func: Callable, args: tuple) -> Message:
    operation = func._overloadpacket.__name__  # type: ignore[attr-defined]
    group = next(dist.ProcessGroup.unbox(arg) for arg in args if isinstance(arg, torch.ScriptObject))
    first, second = (sum(tensor.nbytes for tensor in _tensors(arg)) for arg in args[:2])
    others = (group.size() - 1) / group.size()
    match operation:
        case "send" | "barrier":
            received = 0.0
        case "recv_":
            received = first
        case "broadcast_":
            received = 0.0 if args[2] == group.rank() else first
        case "allreduce_":
            received = 2 * others * first
        case "alltoall_base_":
            received = others * first
        case _ if "allgather" in operation or "reduce_scatter" in operation:  # outputs, then inputs
            received = abs(first - second)
        case _:
            raise NotImplementedError(f"what {operation} moves is not known here")
    largest = max((tensor for arg in args for tensor in _tensors(arg)), key=lambda tensor: tensor.nbytes)
    peer = args[2] if operation in ("send", "recv_") else None
    return Message(operation, group.group_desc, peer, largest.dtype, tuple(largest.shape), received)


def _tensors(arg: Any) -> list[torch.Tensor]:
    """The tensors in an argument, which may be nested lists."""
    if isinstance(arg, torch.Tensor):
        return [arg]
    return [tensor for part in arg for tensor in _tensors(part)] if isinstance(arg, list | tuple) else []

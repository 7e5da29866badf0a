"""Bindings of whole tensors and of row and column shards."""

import torch

from mimo_gemma4.weights import Binding, Index, Init


def whole(shape: torch.Size | tuple[int, ...]) -> Index:
    """The index of everything in a tensor of this shape."""
    return tuple(slice(0, size) for size in shape)


def bind_replicated(name: str, tensor: torch.Tensor, *, init: Init = "normal", std: float = 0.02) -> Binding:
    """A tensor that every rank holds whole."""
    index = whole(tensor.shape)
    return Binding(name, tuple(tensor.shape), index, tensor, index, init, std)


def bind_rows(name: str, tensor: torch.Tensor, *, at: int, size: int, rank: int, ranks: int, std: float) -> Binding:
    """`size` rows from `at` of a local tensor, which hold part `rank` of the `ranks` equal parts of the whole."""
    columns = slice(0, tensor.shape[1])
    index = (slice(rank * size, (rank + 1) * size), columns)
    return Binding(name, (ranks * size, tensor.shape[1]), index, tensor, (slice(at, at + size), columns), std=std)


def bind_columns(name: str, tensor: torch.Tensor, *, rank: int, ranks: int, std: float) -> Binding:
    """A local tensor that holds part `rank` of the `ranks` equal parts of the whole's columns."""
    rows, size = tensor.shape
    index = (slice(0, rows), slice(rank * size, (rank + 1) * size))
    return Binding(name, (rows, ranks * size), index, tensor, whole(tensor.shape), std=std)

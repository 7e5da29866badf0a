"""Reads and writes safetensors files a few rows at a time, so that conversions hold no whole model, file or tensor.

safetensors' own functions map whole files, whose pages count as memory of the process, and write a file only from all
of its tensors at once. The format: the length of a JSON header as 8 bytes, the header, the data
(https://huggingface.co/docs/safetensors).
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from mimo_gemma4.errors import CheckpointError

PIECE_BYTES = 64 * 2**20
"""Approximate size of the pieces in which tensors are read and written."""

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}
"""Element types by their names in safetensors."""


class Checksum(Protocol):
    """A hash object of `hashlib`."""

    def update(self, data: Any, /) -> None:
        """Add bytes."""
        ...


@dataclass(frozen=True)
class TensorEntry:
    """Element type, by its name in safetensors, and shape of a stored tensor. A scalar counts as one row."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def rows(self) -> int:
        """Length of the first dimension."""
        return self.shape[0] if self.shape else 1

    @property
    def row_bytes(self) -> int:
        """Size of one row."""
        return math.prod(self.shape[1:]) * DTYPES[self.dtype].itemsize

    @property
    def bytes(self) -> int:
        """Size of the whole tensor."""
        return self.rows * self.row_bytes

    def pieces(self) -> Iterator[tuple[int, int]]:
        """The rows as ranges `[start, stop)` of about `PIECE_BYTES`, at least one row each."""
        step = max(1, PIECE_BYTES // max(1, self.row_bytes))
        for start in range(0, self.rows, step):
            yield start, min(start + step, self.rows)


class TensorFile:
    """The header of a safetensors file, read once, and its tensors by rows; no file stays open."""

    def __init__(self, path: Path):
        """Read the header. Raises `CheckpointError` if it is damaged or has an element type that torch lacks."""
        self.path = path
        try:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if length > path.stat().st_size - 8:
                    raise ValueError(f"a header of {length} bytes in a file of {path.stat().st_size}")
                header = json.loads(file.read(length), object_pairs_hook=_without_doubles)
            self.metadata: dict[str, str] = header.pop("__metadata__", None) or {}
            self.entries = {name: TensorEntry(entry["dtype"], _sizes(entry["shape"])) for name, entry in header.items()}
            spans = {name: _sizes(entry["data_offsets"]) for name, entry in header.items()}
            if not isinstance(self.metadata, dict) or any(len(span) != 2 for span in spans.values()):
                raise ValueError("its header has no table of texts, or no pair of offsets, where one belongs")
            foreign = sorted({entry.dtype for entry in self.entries.values()} - set(DTYPES))
        except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is no readable safetensors file: {error}") from error
        if foreign:
            raise CheckpointError(f"{path} holds tensors of types {foreign}; known: {', '.join(DTYPES)}")
        needed = self._check_spans(spans)
        self._starts = {name: 8 + length + span[0] for name, span in spans.items()}
        if path.stat().st_size < 8 + length + needed:
            raise CheckpointError(
                f"{path} has {path.stat().st_size} bytes where its header announces {8 + length + needed}"
            )

    def _check_spans(self, spans: Mapping[str, tuple[int, ...]]) -> int:
        """The bytes of all tensors. Raises `CheckpointError` where tensors overlap or leave gaps, as no writer does."""
        end = 0
        for name, span in sorted(spans.items(), key=lambda item: item[1]):
            found, expected = span[1] - span[0], self.entries[name].bytes
            if found != expected:
                raise CheckpointError(f"{self.path} has {found} bytes for {name}, not {expected}")
            if span[0] != end:
                raise CheckpointError(f"{self.path}: {name} begins at byte {span[0]} of the data, not at {end}")
            end = span[1]
        return end

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Rows `[start, stop)` of a tensor, [stop - start, …]; a scalar is its row 0."""
        entry = self.entries[name]
        data = torch.empty((stop - start) * entry.row_bytes, dtype=torch.uint8)
        with self.path.open("rb", buffering=0) as file:
            file.seek(self._starts[name] + start * entry.row_bytes)
            view, done = memoryview(data.numpy()), 0
            while done < len(view):
                count = file.readinto(view[done:])
                if not count:
                    raise CheckpointError(f"{self.path} ends inside {name}")
                done += count
        return data.view(DTYPES[entry.dtype]).view(stop - start, *entry.shape[1:])


def _sizes(values: Any) -> tuple[int, ...]:
    """A list of sizes or offsets. Raises `ValueError` where it is none."""
    if not isinstance(values, list) or not all(type(value) is int and value >= 0 for value in values):
        raise ValueError(f"{values!r} is no list of sizes")
    return tuple(values)


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object as a dict. Raises `ValueError` where a key comes twice."""
    if len(pairs) != len(dict(pairs)):
        raise ValueError(f"a name comes twice among {[name for name, _ in pairs][:3]}…")
    return dict(pairs)


def write_tensor_file(
    path: Path,
    entries: Mapping[str, TensorEntry],
    read: Callable[[str, int, int], Tensor],
    *,
    metadata: Mapping[str, str],
    advance: Callable[[int], object],
    checksum: Checksum | None = None,
) -> None:
    """Write a safetensors file piece by piece and wait until it is on disk.

    Args:
        path: file to create.
        entries: tensors of the file. Tensors of larger elements come first, so that every tensor is aligned.
        read: returns rows `[start, stop)` of a tensor by name, of the entry's type.
        metadata: texts in the header.
        advance: called with the number of bytes written.
        checksum: updated with the bytes written.
    """
    ordered = sorted(entries, key=lambda name: -DTYPES[entries[name].dtype].itemsize)
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name in ordered:
        entry, end = entries[name], offset + entries[name].bytes
        header[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    with path.open("xb") as file:

        def put(data: Any) -> None:
            file.write(data)
            if checksum is not None:
                checksum.update(data)
            advance(len(data))

        put(len(text).to_bytes(8, "little") + text)
        for name in ordered:
            for start, stop in entries[name].pieces():
                put(_bytes_of(read(name, start, stop), entries[name]))  # no name outlives the piece: one at a time
        file.flush()
        os.fsync(file.fileno())


def _bytes_of(rows: Tensor, entry: TensorEntry) -> memoryview:
    assert rows.dtype == DTYPES[entry.dtype]
    return memoryview(rows.contiguous().view(-1).view(torch.uint8).numpy())


def split_into_files(entries: Mapping[str, TensorEntry], limit: int) -> list[list[str]]:
    """Names in order, cut into files of at most `limit` bytes of tensors; a larger tensor has a file of its own."""
    files: list[list[str]] = []
    used = 0
    for name, entry in entries.items():
        if not files or used + entry.bytes > limit:
            files.append([])
            used = 0
        files[-1].append(name)
        used += entry.bytes
    return files


def total_bytes(entries: Iterable[TensorEntry]) -> int:
    """Size of all tensors together."""
    return sum(entry.bytes for entry in entries)

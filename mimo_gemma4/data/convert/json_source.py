"""Rows of JSON files with a list of records or one record per line, such as LLaVA and ShareGPT data."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np

from mimo_gemma4.data.convert.rows import Row
from mimo_gemma4.data.sample import BadSampleError
from mimo_gemma4.errors import DataError

SUFFIXES = (".json", ".jsonl")

_WHITE_SPACE = " \t\r\n"


@dataclass(frozen=True)
class JsonRows:
    """Records of one file."""

    path: Path
    spans: np.ndarray
    """[records, 2] int64: first byte of every record in the file, and the byte behind its last."""
    first: int = 1
    """Number of the first record in the file, counted from 1."""

    @classmethod
    def open(cls, path: Path) -> Self:
        """Find the records of a file. Raises `DataError` if it is neither a list nor one record per line."""
        data = path.read_bytes()
        # One character per byte, so that positions in the text are offsets in the file; JSON's syntax is ASCII.
        text = data.decode("latin-1")
        start = _skip(text, 3 if data.startswith(b"\xef\xbb\xbf") else 0)
        try:
            if path.suffix == ".json" and text[start : start + 1] == "[":
                spans = list(_elements(text, start))
            elif path.suffix == ".json" and not _is_lines(text, start):
                raise DataError(f"{path} holds one JSON value; it must be a list of records, or one record per line")
            else:
                spans = list(_lines(data, start))
        except json.JSONDecodeError as error:
            raise DataError(f"{path} is not a complete JSON file: {error}") from error
        return cls(path, np.array(spans, np.int64).reshape(-1, 2))

    def __len__(self) -> int:
        """Number of records."""
        return len(self.spans)

    def cut(self, start: int, stop: int) -> Self:
        """Records `start` … `stop` - 1."""
        return replace(self, spans=self.spans[start:stop], first=self.first + start)

    @property
    def version(self) -> str:
        """Path, size and modification time of the file."""
        return file_version(self.path)

    def __iter__(self) -> Iterator[tuple[str, Row | BadSampleError]]:
        """(Name, row) of every record; the name is `<file>:<number>` and the record's `id`, if it has one."""
        with self.path.open("rb") as file:
            for number, (start, stop) in enumerate(self.spans.tolist(), self.first):
                file.seek(start)
                row = parse_row(file.read(stop - start))
                yield row_name(self.path, number, row), row


def parse_row(data: bytes) -> Row | BadSampleError:
    """The JSON object in `data`, or the error if it is none."""
    try:
        row = json.loads(data)
    except (ValueError, RecursionError) as error:
        return BadSampleError("json", f"its JSON cannot be read: {error}")
    if not isinstance(row, dict):
        return BadSampleError("json", f"a record is {row!r:.100}; it must be an object")
    return row


def row_name(path: Path, number: int, row: Row | BadSampleError) -> str:
    """Name of a file's row in reports."""
    name = f"{path.name}:{number}"
    return f"{name} id={row['id']}" if isinstance(row, dict) and isinstance(row.get("id"), str | int) else name


def file_version(path: Path) -> str:
    """Path, size and modification time of a file."""
    stat = path.stat()
    return f"{os.path.abspath(path)} {stat.st_size} {stat.st_mtime_ns}"


def _elements(text: str, start: int) -> Iterator[tuple[int, int]]:
    """(Start, end) of every element of the list that opens at `start`."""
    decoder = json.JSONDecoder()
    position = _skip(text, start + 1)
    if text[position : position + 1] == "]":
        return
    while True:
        _, end = decoder.raw_decode(text, position)
        yield position, end
        position = _skip(text, end)
        separator = text[position : position + 1]
        if separator == "]":
            return
        if separator != ",":
            raise json.JSONDecodeError("expected ',' or ']'", text, position)
        position = _skip(text, position + 1)


def _is_lines(text: str, start: int) -> bool:
    """Whether the first value ends on its first line."""
    _, end = json.JSONDecoder().raw_decode(text, start)
    return "\n" not in text[start:end]


def _lines(data: bytes, start: int) -> Iterator[tuple[int, int]]:
    """(Start, end) of every line that is not blank."""
    while start < len(data):
        stop = data.find(b"\n", start)
        stop = len(data) if stop < 0 else stop
        if not data[start:stop].isspace() and start < stop:
            yield start, stop
        start = stop + 1


def _skip(text: str, position: int) -> int:
    while position < len(text) and text[position] in _WHITE_SPACE:
        position += 1
    return position

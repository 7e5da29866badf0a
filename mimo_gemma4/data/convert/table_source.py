"""Rows of Hugging Face data sets on disk: parquet files, and Arrow files of `save_to_disk` or of the hub's cache."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from mimo_gemma4.data.convert.json_source import file_version, row_name
from mimo_gemma4.data.convert.rows import Row
from mimo_gemma4.data.sample import BadSampleError
from mimo_gemma4.errors import DataError

SUFFIXES = (".parquet", ".arrow")

_ROWS_AT_ONCE = 64
"""Number of rows that a parquet file decodes at a time; few, as rows with images are large."""


@dataclass(frozen=True)
class TableRows:
    """Rows `start` … `stop` - 1 of one file."""

    path: Path
    start: int
    stop: int

    @classmethod
    def open(cls, path: Path) -> Self:
        """All rows of a file. Raises `DataError` if it cannot be read or pyarrow is not installed."""
        arrow = _arrow()
        try:
            if path.suffix == ".parquet":
                return cls(path, 0, arrow.parquet.read_metadata(path).num_rows)
            return cls(path, 0, sum(batch.num_rows for batch in _arrow_batches(arrow, path)))
        except (arrow.ArrowException, OSError) as error:
            raise DataError(f"{path} cannot be read: {error}") from error

    def __len__(self) -> int:
        """Number of rows."""
        return self.stop - self.start

    def cut(self, start: int, stop: int) -> Self:
        """Rows `start` … `stop` - 1."""
        return replace(self, start=self.start + start, stop=self.start + stop)

    @property
    def version(self) -> str:
        """Path, size and modification time of the file."""
        return file_version(self.path)

    def __iter__(self) -> Iterator[tuple[str, Row | BadSampleError]]:
        """(Name, row) of every row; the name is `<file>:<number>` and `id`, if there is one. Raises `DataError`."""
        arrow = _arrow()
        batches = self._parquet_batches if self.path.suffix == ".parquet" else self._stream_batches
        try:
            for position, batch in batches(arrow):
                first, last = max(self.start - position, 0), min(self.stop - position, batch.num_rows)
                for place in range(first, last):
                    row = _row(batch, place)
                    yield row_name(self.path, position + place + 1, row), row
        except (arrow.ArrowException, OSError) as error:
            raise DataError(f"{self.path} cannot be read: {error}") from error

    def _parquet_batches(self, arrow: Any) -> Iterator[tuple[int, Any]]:
        """(Number of its first row, batch) of every batch that may hold rows of this part."""
        with arrow.parquet.ParquetFile(self.path) as file:
            groups, first, position = [], 0, 0
            for group in range(file.num_row_groups):
                count = file.metadata.row_group(group).num_rows
                if position + count <= self.start:
                    first = position + count
                elif position < self.stop:
                    groups.append(group)
                position += count
            for batch in file.iter_batches(_ROWS_AT_ONCE, row_groups=groups, use_threads=False):
                if first >= self.stop:
                    return
                yield first, batch
                first += batch.num_rows

    def _stream_batches(self, arrow: Any) -> Iterator[tuple[int, Any]]:
        position = 0
        for batch in _arrow_batches(arrow, self.path):
            if position >= self.stop:
                return
            yield position, batch
            position += batch.num_rows


def _row(batch: Any, place: int) -> Row | BadSampleError:
    try:
        row: Row = {name: _present(value) for name, value in batch.slice(place, 1).to_pylist()[0].items()}
    except ValueError as error:  # text that is not UTF-8, a date that Python cannot represent
        return BadSampleError("json", f"its columns cannot be read: {error}")
    return row


def _present(value: Any) -> Any:
    """A value without the nulls in its objects: a table writes them for every key that another row's object has."""
    if isinstance(value, dict):
        return {key: _present(item) for key, item in value.items() if item is not None}
    return [_present(item) for item in value] if isinstance(value, list) else value


def _arrow_batches(arrow: Any, path: Path) -> Iterator[Any]:
    """Record batches of an Arrow file or stream. The file is memory-mapped, so unread columns cost nothing."""
    with arrow.memory_map(str(path)) as file:
        try:
            stream = arrow.ipc.open_stream(file)
        except arrow.ArrowInvalid:
            reader = arrow.ipc.open_file(file)
            yield from (reader.get_batch(number) for number in range(reader.num_record_batches))
        else:
            yield from stream


def _arrow() -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(
            "reading parquet and arrow files needs pyarrow: uv sync --extra parquet (or pip install pyarrow)"
        ) from error
    return pyarrow

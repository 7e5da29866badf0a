"""Finds WebDataset shards, on local disk or at any fsspec URL, and reads byte ranges of them."""

import glob
import io
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import batched
from pathlib import Path
from typing import Any, BinaryIO, cast

from braceexpand import braceexpand

from mimo_gemma4.data.retries import retried
from mimo_gemma4.errors import DataError

Shard = str
"""Name of a shard: an absolute local path, or the URL of another file system."""

_HEADER_BLOCK = 2**16
"""Bytes per request when a remote shard is indexed: enough for a tar header, a JSON and a media header together."""

_REQUESTS_AT_ONCE = 64
_HTTP_TAGS = ("ETag", "Content-MD5", "Digest", "Last-Modified")
"""What HTTP servers say of a file's version; fsspec's own key of a URL does not change with the file."""


def is_remote(shard: Shard) -> bool:
    """Whether fsspec reads the shard; `expand_shards` turns `file://` URLs into paths."""
    return "://" in shard


def expand_shards(shards: str | Path | Sequence[str | Path]) -> tuple[Shard, ...]:
    """Shards by path or fsspec URL: a name, a brace list (`train-{000..007}.tar`) or a glob (`train-*.tar`).

    The order is as written; matches of one glob are sorted. Raises `DataError` for an empty list, a glob without
    matches, unbalanced braces, a missing file, a shard that is named twice, or a file system that cannot be reached.
    """
    patterns = [shards] if isinstance(shards, str | Path) else list(shards)
    found: list[Shard] = []
    for pattern in patterns:
        try:
            names = list(braceexpand(str(pattern)))
        except ValueError as error:
            raise DataError(f"shards: unbalanced braces in {str(pattern)!r}") from error
        for name in names:
            found.extend(_files(name))
    if not found:
        raise DataError(f"shards is {shards!r}, which names no file")
    missing = [shard for shard in found if not _exists(shard)]
    if missing:
        raise DataError(f"shards: {len(missing)} of {len(found)} files do not exist, the first is {missing[0]}")
    require_distinct(found)
    return tuple(found)


def require_distinct(shards: Sequence[Shard]) -> None:
    """Raise `DataError` for a shard that occurs twice."""
    repeated = sorted(shard for shard, count in Counter(shards).items() if count > 1)
    if repeated:
        raise DataError(f"shards: {repeated[0]} is named more than once; its samples would count double")


def open_shard(shard: Shard) -> BinaryIO:
    """Open a shard as a seekable binary file; from a remote one, only the blocks that are read are fetched."""
    if not is_remote(shard):
        return open(shard, "rb")
    return cast(BinaryIO, io.BufferedReader(_RemoteFile(shard), 1))


def read_range(shard: Shard, offset: int, size: int) -> bytes:
    """`size` bytes of a shard from `offset`. Safe in any thread. Raises `DataError` if the shard is shorter."""
    return next(read_ranges(shard, [(offset, size)]))


def read_ranges(shard: Shard, ranges: Sequence[tuple[int, int]]) -> Iterator[bytes]:
    """The bytes of each (offset, size), many at once from object stores. Raises `DataError` if the shard is shorter."""
    fetch = _remote_ranges if is_remote(shard) else _local_ranges
    try:
        for (offset, size), data in zip(ranges, fetch(shard, ranges), strict=True):
            if len(data) != size:
                raise DataError(
                    f"{shard} ends before byte {offset + size}: it is shorter than when it was indexed; delete "
                    f"{shard}.*.npz to index it anew"
                )
            yield data
    except OSError as error:
        raise DataError(f"{shard} cannot be read: {error}") from error


def _local_ranges(shard: Shard, ranges: Sequence[tuple[int, int]]) -> Iterator[bytes]:
    with open(shard, "rb", buffering=0) as file:
        for offset, size in ranges:
            yield os.pread(file.fileno(), size, offset)


def _remote_ranges(shard: Shard, ranges: Sequence[tuple[int, int]]) -> Iterator[bytes]:
    system, path = file_system(shard)
    for some in batched(ranges, _REQUESTS_AT_ONCE):
        starts, ends = [offset for offset, _ in some], [offset + size for offset, size in some]
        answers = system.cat_ranges([path] * len(some), starts, ends, on_error="return")
        for (offset, size), data in zip(some, answers, strict=True):
            if isinstance(data, bytes) and len(data) == size:
                yield data
            else:  # an error, or an answer of another size
                yield _fetch(shard, offset, size)


def _fetch(shard: Shard, offset: int, size: int) -> bytes:
    """A range of a remote shard, tried again until its size is right. Raises `DataError`."""
    system, path = file_system(shard)

    def fetch() -> bytes:
        data = bytes(system.cat_file(path, start=offset, end=offset + size))
        if len(data) > size:
            raise DataError(
                f"{shard}: its server answered a request for {size} bytes with {len(data)}: it serves no ranges; copy "
                f"the shard to a local disk or to a server that does"
            )
        if len(data) < size:
            raise OSError(f"{len(data)} of {size} bytes at {offset} were answered")
        return data

    return retried(shard, fetch)


class _RemoteFile(io.RawIOBase):
    """A remote shard as a seekable file. Requests are tried again, and short answers are errors, never its end."""

    def __init__(self, shard: Shard) -> None:
        self._shard, self._position = shard, 0
        self._file: Any = None
        self._size = int(_information(shard)["size"] or 0)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, position: int, whence: int = io.SEEK_SET) -> int:
        self._position = position + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        return self._position

    def readinto(self, buffer: Any) -> int:
        size = max(0, min(len(buffer), self._size - self._position))
        if size:
            buffer[:size] = retried(self._shard, lambda: self._read(size))
            self._position += size
        return size

    def close(self) -> None:
        self._drop()
        super().close()

    def _read(self, size: int) -> bytes:
        try:
            if self._file is None:
                system, path = file_system(self._shard)
                self._file = system.open(path, "rb", block_size=_HEADER_BLOCK)
                if not self._file.seekable():
                    raise DataError(f"{self._shard}: its server serves no ranges; copy the shard to a local disk")
            self._file.seek(self._position)
            data = bytes(self._file.read(size))
            if len(data) != size:
                raise OSError(f"{len(data)} of {size} bytes at {self._position} were answered")
            return data
        except BaseException:
            self._drop()  # its cache may hold a part of a short answer
            raise

    def _drop(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()


def _information(shard: Shard) -> dict[str, Any]:
    """What a file system knows of a remote shard, asked anew. Raises `DataError`, `FileNotFoundError` if absent."""
    system, path = file_system(shard)

    def ask() -> dict[str, Any]:
        system.invalidate_cache()
        return cast(dict[str, Any], system.info(path))

    return retried(shard, ask)


def shard_version(shard: Shard) -> str:
    """Size and modification time (or tag) of a shard, as one text; it changes when the shard is replaced."""
    if not is_remote(shard):
        stat = os.stat(shard)
        return f"{stat.st_size} {stat.st_mtime_ns}"
    system, path = file_system(shard)
    information = _information(shard)
    tags = [f"{name}={information[name]}" for name in _HTTP_TAGS if information.get(name)]
    return f"{information['size']} {' '.join(tags) or system.ukey(path)}"


def file_system(shard: Shard) -> tuple[Any, str]:
    """The fsspec file system of a URL and the path in it. Raises `DataError` if its package is not installed."""
    import fsspec

    try:
        return cast(tuple[Any, str], fsspec.core.url_to_fs(shard))
    except (ImportError, ValueError) as error:
        raise DataError(f"shards: {shard}: {error}") from error


def _files(name: str) -> list[Shard]:
    if is_remote(name):
        system, path = file_system(name)
        if "file" not in (system.protocol if isinstance(system.protocol, tuple) else (system.protocol,)):
            return _remote_files(name, system, path)
        name = path
    name = os.path.expanduser(name)
    if not glob.has_magic(name):
        return [os.path.abspath(name)]
    matches = sorted(glob.glob(name, recursive=True))
    if not matches:
        raise DataError(f"shards: {name!r} matches no file in {Path.cwd()}")
    return [os.path.abspath(match) for match in matches]


def _remote_files(name: str, system: Any, path: str) -> list[Shard]:
    if not glob.has_magic(path):
        return [name if "::" in name else system.unstrip_protocol(path)]  # a chain of file systems stays as written
    try:
        matches = sorted(system.glob(path))
    except OSError as error:
        raise DataError(f"shards: {name!r} cannot be listed: {error}") from error
    if not matches:
        raise DataError(f"shards: {name!r} matches no file")
    return [system.unstrip_protocol(match) for match in matches]


def _exists(shard: Shard) -> bool:
    if not is_remote(shard):
        return os.path.isfile(shard)
    try:
        return _information(shard).get("type") != "directory"
    except FileNotFoundError:
        return False

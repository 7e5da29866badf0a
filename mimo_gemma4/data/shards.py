"""Finds WebDataset shards, on local disk or at any fsspec URL, and reads byte ranges of them."""

import glob
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import batched
from pathlib import Path
from typing import Any, BinaryIO, cast

from braceexpand import braceexpand

from mimo_gemma4.errors import DataError

Shard = str
"""Name of a shard: an absolute local path, or the URL of another file system."""

_HEADER_BLOCK = 2**16
"""Bytes per request when a remote shard is indexed: enough for a tar header, a JSON and a media header together."""

_REQUESTS_AT_ONCE = 64


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
    system, path = file_system(shard)
    return cast(BinaryIO, system.open(path, "rb", block_size=_HEADER_BLOCK))


def read_range(shard: Shard, offset: int, size: int) -> bytes:
    """`size` bytes of a shard from `offset`. Safe in any thread. Raises `DataError` if the shard is shorter."""
    return next(read_ranges(shard, [(offset, size)]))


def read_ranges(shard: Shard, ranges: Sequence[tuple[int, int]]) -> Iterator[bytes]:
    """The bytes of each (offset, size), many at once from object stores. Raises `DataError` if the shard is shorter."""
    fetch = _remote_ranges if is_remote(shard) else _local_ranges
    try:
        for (offset, size), data in zip(ranges, fetch(shard, ranges), strict=True):
            if len(data) != size:
                raise DataError(f"{shard} ends before byte {offset + size}; it has changed since it was indexed")
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
        yield from system.cat_ranges([path] * len(some), starts, ends, on_error="raise")


def shard_version(shard: Shard) -> str:
    """Size and modification time (or tag) of a shard, as one text; it changes when the shard is replaced."""
    if not is_remote(shard):
        stat = os.stat(shard)
        return f"{stat.st_size} {stat.st_mtime_ns}"
    system, path = file_system(shard)
    return f"{system.size(path)} {system.ukey(path)}"


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
    system, path = file_system(shard)
    try:
        return bool(system.isfile(path))
    except OSError as error:
        raise DataError(f"shards: {shard} cannot be reached: {error}") from error

"""What tells later whether a file is still the one that was read or written."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

FileStamp = Sequence[int] | None
"""Size and modification time in ns of a file that is read; None: it cannot be read."""
ShardStamp = Sequence[int | str]
"""Size and SHA-256 of a file that is written."""


def stamp_of_file(path: str) -> FileStamp:
    """The stamp of a source's file."""
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return [stat.st_size, stat.st_mtime_ns]


def stamp_of_shard(path: Path) -> ShardStamp:
    """The stamp of a shard; the file is read whole."""
    with path.open("rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def is_shard(path: Path, stamp: ShardStamp, *, whole: bool) -> bool:
    """Whether a shard is there with its size and, if `whole`, its content."""
    return path.is_file() and path.stat().st_size == stamp[0] and (not whole or stamp_of_shard(path) == list(stamp))

"""Names of WebDataset shards, and reads of byte ranges inside them."""

import glob
import os
from collections.abc import Sequence
from pathlib import Path

from braceexpand import braceexpand

from mimo_gemma4.errors import DataError


def expand_shards(shards: str | Path | Sequence[str | Path]) -> tuple[Path, ...]:
    """Absolute paths of shards given by name, brace list (`train-{000..007}.tar`) or glob (`train-*.tar`).

    Order: as written; the matches of one glob are sorted. Raises `DataError` for a list without shards, a glob without
    matches, unbalanced braces, a missing file, or a shard that is named twice.
    """
    patterns = [shards] if isinstance(shards, str | Path) else list(shards)
    paths: list[Path] = []
    for pattern in patterns:
        try:
            names = list(braceexpand(str(pattern)))
        except ValueError as error:
            raise DataError(f"shards: unbalanced braces in {str(pattern)!r}") from error
        for name in names:
            paths.extend(_files(name))
    if not paths:
        raise DataError(f"shards is {shards!r}, which names no file")
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise DataError(f"shards: {len(missing)} of {len(paths)} files do not exist, the first is {missing[0]}")
    repeated = sorted({str(path) for path in paths if paths.count(path) > 1}) if len(set(paths)) < len(paths) else []
    if repeated:
        raise DataError(f"shards: {repeated[0]} is named more than once; its samples would count double")
    return tuple(paths)


def _files(name: str) -> list[Path]:
    name = os.path.expanduser(name)
    if not glob.has_magic(name):
        return [Path(name).absolute()]
    matches = sorted(glob.glob(name, recursive=True))
    if not matches:
        raise DataError(f"shards: {name!r} matches no file in {Path.cwd()}")
    return [Path(match).absolute() for match in matches]


def read_range(path: Path, offset: int, size: int) -> bytes:
    """`size` bytes of a file from `offset`; any thread may call it. Raises `DataError` if they are not there."""
    try:
        with open(path, "rb", buffering=0) as file:
            data = os.pread(file.fileno(), size, offset)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if len(data) != size:
        raise DataError(f"{path} ends before byte {offset + size}; it has changed since it was indexed")
    return data

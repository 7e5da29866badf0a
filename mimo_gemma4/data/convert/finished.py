"""What a finished conversion keeps to be verified by, and the lock that keeps two conversions out of one folder."""

import fcntl
import gzip
import json
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mimo_gemma4.atomic import replace_file
from mimo_gemma4.data.convert.samples import PartResult
from mimo_gemma4.data.convert.stamps import ShardStamp, is_shard, stamp_of_file
from mimo_gemma4.errors import DataError

_STATE = ".converted.json.gz"
_LOCK = ".lock"


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Hold a folder alone. Raises `DataError` where another process holds it; its end frees the folder."""
    output.mkdir(parents=True, exist_ok=True)
    with (output / _LOCK).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise DataError(
                f"--out {output} is being written by another conversion ({file.read() or 'just started'}); wait for "
                "its end, or choose a new folder"
            ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def save_state(output: Path, results: Sequence[PartResult], valid: Sequence[ShardStamp]) -> None:
    """Keep the results of all parts, and the stamps of the shards that join held-out samples."""
    state = {"parts": [result.to_json() for result in results], "valid": list(valid)}
    replace_file(output / _STATE, gzip.compress(json.dumps(state).encode(), mtime=0))


def load_state(output: Path) -> tuple[list[PartResult], list[ShardStamp]] | None:
    """The results and stamps that `save_state` kept; None if they cannot be read."""
    try:
        state = json.loads(gzip.decompress((output / _STATE).read_bytes()))
        return [PartResult.from_json(text) for text in state["parts"]], list(state["valid"])
    except (OSError, EOFError, ValueError, KeyError, TypeError):
        return None


def changed_files(result: PartResult) -> list[str]:
    """The media files of a part that are other than when it was converted."""
    return [path for path, stamp in result.files.items() if stamp_of_file(path) != stamp]


def damaged_shards(output: Path, names: Sequence[str], stamps: Sequence[ShardStamp]) -> list[int]:
    """Numbers of the shards that are missing or hold other bytes; every shard is read whole."""
    pairs = zip(names, stamps, strict=True)
    return [number for number, (name, stamp) in enumerate(pairs) if not is_shard(output / name, stamp, whole=True)]

"""Files beside a shard that keep its index, so that the shard is read only once."""

import contextlib
import hashlib
import io
import logging
import os
import tempfile
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from mimo_gemma4.data.shards import Shard, file_system, is_remote, shard_version

logger = logging.getLogger(__name__)

FORMAT_VERSION = 5
"""Raised when the meaning of a stored array changes; files of another version are written anew."""


def load_sidecar(shard: Shard, name: str) -> dict[str, np.ndarray] | None:
    """The arrays saved under `name`; None if there are none, or if the shard has changed since."""
    stamp = _stamp(shard)
    for place in _candidates(shard, name):
        try:
            content = _read(place)
        except Exception:  # none there, or it cannot be read: each file system has errors of its own
            continue
        try:
            with np.load(io.BytesIO(content), allow_pickle=False) as file:
                arrays = dict(file)
            kept = arrays.pop("stamp").item()
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            logger.warning("%s is damaged (%s); it is built anew", place, error)
            continue
        if kept == stamp:
            return arrays
        logger.warning("%s belongs to another version of the shard or of this program; it is built anew", place)
    return None


def save_sidecar(shard: Shard, name: str, arrays: dict[str, np.ndarray]) -> str | None:
    """Save the arrays beside the shard, or in the user's cache folder if that fails, and return the path.

    None if both fail. A reader sees the old file or the whole new one, also while several processes write.
    """
    content = io.BytesIO()
    stamped: dict[str, Any] = {"stamp": np.array(_stamp(shard)), **arrays}
    np.savez_compressed(content, **stamped)
    for place in _candidates(shard, name):
        with contextlib.suppress(OSError, NotImplementedError):  # the latter from read-only file systems
            _write(place, content.getvalue())
            return place
    return None


def remove_sidecar(shard: Shard, name: str) -> None:
    """Remove what was saved under `name`, where it can be removed."""
    for place in _candidates(shard, name):
        with contextlib.suppress(OSError, NotImplementedError):
            if is_remote(place):
                system, path = file_system(place)
                system.rm_file(path)
            else:
                Path(place).unlink()


def _candidates(shard: Shard, name: str) -> tuple[str, str]:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    parent, _, base = shard.rpartition("/")
    folder = hashlib.sha256(parent.encode()).hexdigest()[:16]
    file = f"{base}.{name}.npz"
    return f"{parent}/{file}", str(cache / "mimo_gemma4" / folder / file)


def _stamp(shard: Shard) -> str:
    return f"{FORMAT_VERSION} {shard_version(shard)}"


def _read(place: str) -> bytes:
    if not is_remote(place):
        return Path(place).read_bytes()
    system, path = file_system(place)
    return bytes(system.cat_file(path))


def _write(place: str, content: bytes) -> None:
    if is_remote(place):
        system, path = file_system(place)
        if "http" in system.protocol or "https" in system.protocol:
            raise NotImplementedError(f"{place}: HTTP is read-only")
        system.pipe_file(path, content)  # object stores replace a file as a whole
        return
    target = Path(place)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(partial, 0o644)
        os.replace(partial, target)
    except BaseException:
        os.unlink(partial)
        raise

"""Small files beside a shard that keep what was learned by reading it, so that it is read once."""

import contextlib
import hashlib
import os
import tempfile
import zipfile
from pathlib import Path

import numpy as np

FORMAT_VERSION = 1
"""Raised whenever the meaning of a stored array changes; files of another version are made anew."""


def load_sidecar(shard: Path, name: str) -> dict[str, np.ndarray] | None:
    """The arrays saved for the shard under `name`, or None if there are none for the shard as it is now."""
    for path in _candidates(shard, name):
        with contextlib.suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            with np.load(path, allow_pickle=False) as file:
                arrays = dict(file)
            if arrays.pop("stamp").item() == _stamp(shard):
                return arrays
    return None


def save_sidecar(shard: Path, name: str, arrays: dict[str, np.ndarray]) -> Path | None:
    """Save the arrays next to the shard, or in the user's cache folder if that cannot be written; None if neither can.

    A reader sees the old file or the whole new one, whoever else writes at the same time.
    """
    for path in _candidates(shard, name):
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
            try:
                with os.fdopen(handle, "wb") as file:
                    np.savez(file, stamp=np.array(_stamp(shard)), **arrays)  # type: ignore[arg-type]
                os.chmod(partial, 0o644)
                os.replace(partial, path)
            except BaseException:
                os.unlink(partial)
                raise
            return path
    return None


def _candidates(shard: Path, name: str) -> tuple[Path, Path]:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = hashlib.sha256(str(shard.parent).encode()).hexdigest()[:16]
    file = f"{shard.name}.{name}.npz"
    return shard.parent / file, cache / "mimo_gemma4" / folder / file


def _stamp(shard: Path) -> str:
    stat = shard.stat()
    return f"{FORMAT_VERSION} {stat.st_size} {stat.st_mtime_ns}"

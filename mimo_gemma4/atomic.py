"""Files and folders that are written completely or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mimo_gemma4.errors import CheckpointError


def replace_file(path: Path, content: bytes | str) -> None:
    """Replace a file so that readers see either all of its old content or all of its new; text is UTF-8."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(partial, path)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A hidden folder beside `path` to fill: renamed to `path` at the end, removed where the block fails.

    Raises `CheckpointError` where `path` exists or cannot be written.
    """
    if path.exists():
        raise CheckpointError(f"{path} exists and is not overwritten; name another folder or remove it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be created: {error}") from error
    try:
        yield partial
        partial.chmod(0o755)
        flush(partial)
        partial.rename(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # nothing is left to remove after the rename
    flush(path.parent)


def flush(path: Path) -> None:
    """Wait until a file's or folder's contents are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

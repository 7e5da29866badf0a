"""Files and folders that exist whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mimo_gemma4.errors import CheckpointError


def replace_file(path: Path, content: bytes | str) -> None:
    """Write a file of which readers see the old content or all of the new one; text is UTF-8."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(partial, path)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A hidden folder beside `path` to fill, which gets its name at the end, or is removed where the block fails.

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
        shutil.rmtree(partial, ignore_errors=True)  # gone where it has got its name
    flush(path.parent)


def flush(path: Path) -> None:
    """Wait until a file's or folder's contents are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

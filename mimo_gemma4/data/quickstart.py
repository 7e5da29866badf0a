"""Writes the shards of a quickstart (`data.quickstart`) on first use."""

import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mimo_gemma4.data import digits, digits_and_tones
from mimo_gemma4.errors import DataError

TRAIN_SHARDS = 4

Samples = list[dict[str, Any]]
"""WebDataset samples, as `webdataset.TarWriter` takes them."""

_MAKERS: dict[str, Callable[[], tuple[Samples, Samples]]] = {
    "digits": digits.make_samples,
    "digits_and_tones": digits_and_tones.make_samples,
}
_MARKER = ".complete"


def ensure_shards(quickstart: str, folder: str | Path) -> tuple[list[Path], list[Path]]:
    """Training and validation shards in `folder`, written on first use. Other processes must wait for it.

    An interrupted run leaves no partial shard, and complete shards are not written again. Raises `DataError` if a file
    of the same name exists, as it may be the user's.
    """
    folder = Path(folder)
    train = [folder / f"train-{number:06d}.tar" for number in range(TRAIN_SHARDS)]
    valid = [folder / "valid-000000.tar"]
    if not (folder / _MARKER).exists():
        if taken := [str(path) for path in (*train, *valid) if path.exists()]:
            raise DataError(
                f"data.quickstart would write over {', '.join(taken)}: set data.quickstart=null to train on shards of "
                "your own, or name another folder in data.train.shards"
            )
        folder.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=folder, prefix=".partial-"))
        try:
            _write_all(quickstart, [partial / path.name for path in train], partial / valid[0].name)
            for path in (*train, *valid):
                os.replace(partial / path.name, path)
            (folder / _MARKER).touch()
        finally:
            shutil.rmtree(partial)
    return train, valid


def _write_all(quickstart: str, train: Sequence[Path], valid: Path) -> None:
    train_samples, valid_samples = _MAKERS[quickstart]()
    size = -(-len(train_samples) // len(train))
    for number, path in enumerate(train):
        _write(path, train_samples[number * size : (number + 1) * size])
    _write(valid, valid_samples)


def _write(path: Path, samples: Samples) -> None:
    from webdataset import TarWriter

    with TarWriter(str(path), mtime=0) as writer:
        for sample in samples:
            writer.write(sample)

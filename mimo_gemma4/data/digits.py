"""The quickstart data: questions about pictures of handwritten digits, from the 1,797 scans that scikit-learn ships.

A picture shows one or two digits side by side; the question is what number it shows. Training and validation share no
scan.
"""

import io
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

TRAIN_SHARDS = 4
TRAIN_SAMPLES = 6_000
VALID_SCANS = 360
"""Scans kept for validation: each is shown once, a third of them alone and the others in pairs."""
SIDE = 48
"""Pixels on the side of one digit."""
QUESTION = "What number is this?"

_SEED = 1797
_MARKER = ".complete"
_MARGIN = 4
"""Pixels around a digit in its tile."""
_SHIFT = 2
"""Pixels by which a training digit may be moved each way."""


def ensure_digits(folder: str | Path) -> tuple[list[Path], list[Path]]:
    """Train and validation shards in `folder`, written on first use (by one process; the others wait for it).

    The shards appear all at once: an interrupted run leaves none, and a finished one is never written again.
    """
    folder = Path(folder)
    train = [folder / f"train-{number:06d}.tar" for number in range(TRAIN_SHARDS)]
    valid = [folder / "valid-000000.tar"]
    if not (folder / _MARKER).exists():
        folder.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=folder, prefix=".partial-"))
        try:
            _write_all([partial / path.name for path in train], partial / valid[0].name)
            for path in (*train, *valid):
                os.replace(partial / path.name, path)
            (folder / _MARKER).touch()
        finally:
            shutil.rmtree(partial)
    return train, valid


def split_scans() -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the scans for training and for validation: disjoint, in a fixed random order."""
    order = np.random.Generator(np.random.PCG64(_SEED)).permutation(1797)
    return order[VALID_SCANS:], order[:VALID_SCANS]


def _write_all(train: Sequence[Path], valid: Path) -> None:
    from sklearn.datasets import load_digits

    scans = load_digits()
    train_scans, valid_scans = split_scans()
    generator = np.random.Generator(np.random.PCG64([_SEED, 1]))
    samples = list(_train_samples(train_scans, scans, generator))
    size = TRAIN_SAMPLES // len(train)
    for number, path in enumerate(train):
        _write(path, samples[number * size : (number + 1) * size])
    _write(valid, list(_valid_samples(valid_scans, scans)))


def _train_samples(numbers: np.ndarray, scans: Any, generator: np.random.Generator) -> Iterator[dict[str, Any]]:
    for position in range(TRAIN_SAMPLES):
        chosen = generator.choice(numbers, size=1 + position % 2, replace=False)
        tiles = [_tile(scans.images[n], generator.integers(-_SHIFT, _SHIFT + 1, 2)) for n in chosen]
        contrast = generator.uniform(0.8, 1.0)
        yield _sample(f"train-{position:05d}", tiles, [scans.target[n] for n in chosen], contrast)


def _valid_samples(numbers: np.ndarray, scans: Any) -> Iterator[dict[str, Any]]:
    alone = len(numbers) // 3
    shown = [[n] for n in numbers[:alone]] + numbers[alone:].reshape(-1, 2).tolist()
    for position, chosen in enumerate(shown):
        tiles = [_tile(scans.images[n], np.zeros(2, int)) for n in chosen]
        yield _sample(f"valid-{position:05d}", tiles, [scans.target[n] for n in chosen], 1.0)


def _tile(scan: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """A scan [8, 8] with values 0 … 16 as a tile [SIDE, SIDE] with values 0 … 255, moved by (down, right) pixels."""
    size = SIDE - 2 * _MARGIN
    small = Image.fromarray((scan * (255 / 16)).astype(np.uint8))
    tile = np.zeros((SIDE, SIDE), np.uint8)
    down, right = _MARGIN + shift
    tile[down : down + size, right : right + size] = np.asarray(small.resize((size, size), Image.Resampling.BICUBIC))
    return tile


def _sample(key: str, tiles: Sequence[np.ndarray], digits: Sequence[int], contrast: float) -> dict[str, Any]:
    """A WebDataset sample; its keys begin with split and number, so that they are unique over all shards."""
    picture = Image.fromarray((np.concatenate(tiles, axis=1) * contrast).astype(np.uint8)).convert("RGB")
    buffer = io.BytesIO()
    picture.save(buffer, "png", compress_level=1)
    question = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    answer = [{"type": "text", "text": "".join(str(digit) for digit in digits)}]
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"__key__": key, "json": {"messages": messages}, "0.png": buffer.getvalue()}


def _write(path: Path, samples: Sequence[dict[str, Any]]) -> None:
    from webdataset import TarWriter

    with TarWriter(str(path), mtime=0) as writer:
        for sample in samples:
            writer.write(sample)

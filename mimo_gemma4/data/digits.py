"""The quickstart data: questions about pictures of handwritten digits, from the 1,797 scans that scikit-learn ships.

A picture shows one or two digits side by side; the question is what number it shows. Training and validation share no
scan.
"""

import io
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from mimo_gemma4.errors import optional_import

TRAIN_SAMPLES = 6_000
VALID_SCANS = 360
"""Scans for validation: each is shown once, a third of them alone and the others in pairs."""
SIDE = 48
"""Side of one digit in pixels."""
QUESTION = "What number is this?"

_SEED = 1797
_MARGIN = 4
"""Margin around a digit in its tile, in pixels."""
_SHIFT = 2
"""Largest shift of a training digit in each direction, in pixels."""


def make_samples() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The samples for training and for validation; always the same. Raises `MissingPackageError`."""
    scans = load_scans()
    train_scans, valid_scans = split_scans()
    generator = np.random.Generator(np.random.PCG64([_SEED, 1]))
    return list(_train_samples(train_scans, scans, generator)), list(_valid_samples(valid_scans, scans))


def load_scans() -> Any:
    """scikit-learn's digits: `images` [1797, 8, 8] and `target` [1797]. Raises `MissingPackageError`."""
    with optional_import("scikit-learn", extra="quickstart", purpose="the quickstart's data"):
        from sklearn.datasets import load_digits
    return load_digits()


def split_scans() -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the scans for training and for validation: disjoint, in a fixed random order."""
    order = np.random.Generator(np.random.PCG64(_SEED)).permutation(1797)
    return order[VALID_SCANS:], order[:VALID_SCANS]


def _train_samples(numbers: np.ndarray, scans: Any, generator: np.random.Generator) -> Iterator[dict[str, Any]]:
    for position in range(TRAIN_SAMPLES):
        chosen = generator.choice(numbers, size=1 + position % 2, replace=False)
        picture = draw([scans.images[n] for n in chosen], generator)
        yield _sample(f"train-{position:05d}", picture, [scans.target[n] for n in chosen])


def _valid_samples(numbers: np.ndarray, scans: Any) -> Iterator[dict[str, Any]]:
    alone = len(numbers) // 3
    shown = [[n] for n in numbers[:alone]] + numbers[alone:].reshape(-1, 2).tolist()
    for position, chosen in enumerate(shown):
        picture = draw([scans.images[n] for n in chosen])
        yield _sample(f"valid-{position:05d}", picture, [scans.target[n] for n in chosen])


def draw(scans: Sequence[np.ndarray], generator: np.random.Generator | None = None) -> bytes:
    """A PNG file of scans [8, 8] side by side, each a square of `SIDE` pixels.

    With a `generator` (for training), every scan is shifted and the contrast lowered at random.
    """
    if generator is None:
        return _png([_tile(scan, np.zeros(2, int)) for scan in scans], 1.0)
    tiles = [_tile(scan, generator.integers(-_SHIFT, _SHIFT + 1, 2)) for scan in scans]
    return _png(tiles, generator.uniform(0.8, 1.0))


def _tile(scan: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """A scan [8, 8] of values 0 … 16 as a tile [SIDE, SIDE] of values 0 … 255, shifted by (down, right) pixels."""
    size = SIDE - 2 * _MARGIN
    small = Image.fromarray((scan * (255 / 16)).astype(np.uint8))
    tile = np.zeros((SIDE, SIDE), np.uint8)
    down, right = _MARGIN + shift
    tile[down : down + size, right : right + size] = np.asarray(small.resize((size, size), Image.Resampling.BICUBIC))
    return tile


def _png(tiles: Sequence[np.ndarray], contrast: float) -> bytes:
    picture = Image.fromarray((np.concatenate(tiles, axis=1) * contrast).astype(np.uint8)).convert("RGB")
    buffer = io.BytesIO()
    picture.save(buffer, "png", compress_level=1)
    return buffer.getvalue()


def _sample(key: str, picture: bytes, digits: Sequence[int]) -> dict[str, Any]:
    """A WebDataset sample. Its key consists of split and number, so it is unique over all shards."""
    question = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    answer = [{"type": "text", "text": "".join(str(digit) for digit in digits)}]
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"__key__": key, "json": {"messages": messages}, "0.png": picture}

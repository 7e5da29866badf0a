"""Data of the quickstart with sound: digits drawn, dialled, both in one sample, or spelled out without media.

Every sample asks for its digits. Training and validation share no scan, no sound and no spelled-out number.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mimo_gemma4.data.dial_tones import dial
from mimo_gemma4.data.digits import draw, load_scans, split_scans

TRAIN_SAMPLES = 2_400
"""Training samples of each kind."""
VALID_SAMPLES = 100
"""Validation samples of each kind."""
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

_SEED = 697
_SPELLED = 3
"""Number of digits of a spelled-out number."""

_Content = tuple[dict[str, bytes], str, Sequence[int]]
"""Media files by extension, in the order of the message; the question; the digits of the answer."""


@dataclass(frozen=True)
class _Split:
    """Sources of the samples for training or for validation."""

    name: str
    pictures: dict[int, list[np.ndarray]]
    """Scans [8, 8] by digit."""
    numbers: np.ndarray
    """Numbers that may be spelled out."""
    generator: np.random.Generator
    moved: bool
    """Whether position and contrast of pictures vary."""


def make_samples() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The samples for training and for validation, kinds in turn; always the same. Raises `MissingPackageError`."""
    scans = load_scans()
    numbers = _generator(0).permutation(10**_SPELLED)
    train_scans, valid_scans = split_scans()
    train = _Split("train", _by_digit(scans, train_scans), numbers[VALID_SAMPLES:], _generator(1), moved=True)
    valid = _Split("valid", _by_digit(scans, valid_scans), numbers[:VALID_SAMPLES], _generator(2), moved=False)
    return _samples(train, TRAIN_SAMPLES), _samples(valid, VALID_SAMPLES)


def _generator(stream: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64([_SEED, stream]))


def _by_digit(scans: Any, numbers: np.ndarray) -> dict[int, list[np.ndarray]]:
    return {digit: [scans.images[n] for n in numbers if scans.target[n] == digit] for digit in range(10)}


def _samples(split: _Split, count: int) -> list[dict[str, Any]]:
    kinds = (_drawn, _dialled, _drawn_and_dialled, _spelled)
    return [
        _sample(f"{split.name}-{n * len(kinds) + k:05d}", *kind(split, n))
        for n in range(count)
        for k, kind in enumerate(kinds)
    ]


def _drawn(split: _Split, number: int) -> _Content:
    digits = _digits(split, 1 + number % 2)
    return {"png": _draw(split, digits)}, "Drawn?", digits


def _dialled(split: _Split, number: int) -> _Content:
    digits = _digits(split, 1 + number % 2)
    return {"wav": dial(digits, split.generator)}, "Dialled number?", digits


def _drawn_and_dialled(split: _Split, number: int) -> _Content:
    digits = _digits(split, 3)
    media = {"png": _draw(split, digits[:2]), "wav": dial(digits[2:], split.generator)}
    return media, "Drawn and dialled?", digits


def _spelled(split: _Split, number: int) -> _Content:
    digits = [int(digit) for digit in f"{split.numbers[number % len(split.numbers)]:0{_SPELLED}d}"]
    return {}, f"{' '.join(WORDS[digit] for digit in digits)}?", digits


def _digits(split: _Split, count: int) -> list[int]:
    return [int(digit) for digit in split.generator.integers(10, size=count)]


def _draw(split: _Split, digits: Sequence[int]) -> bytes:
    chosen = [split.pictures[digit][split.generator.integers(len(split.pictures[digit]))] for digit in digits]
    return draw(chosen, split.generator if split.moved else None)


def _sample(key: str, media: dict[str, bytes], question: str, digits: Sequence[int]) -> dict[str, Any]:
    types = {"png": "image", "wav": "audio"}
    content = [*({"type": types[extension]} for extension in media), {"type": "text", "text": question}]
    answer = [{"type": "text", "text": "".join(map(str, digits))}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    files = {f"{number}.{extension}": data for number, (extension, data) in enumerate(media.items())}
    return {"__key__": key, "json": {"messages": messages}} | files

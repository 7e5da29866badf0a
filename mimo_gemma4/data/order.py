"""The endless order of samples in training: a pure function of the place, equally fast for any place.

Every pass over a dataset is a new permutation of it; a table assigns the places of the global order to the datasets by
weight. There is no state between places, so resuming costs nothing.
"""

import hashlib
import itertools
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

_PERIOD = 2**14
"""Places after which the assignment to datasets repeats; the resolution of the weights is one place in a period."""
_ROUNDS = 8
"""Rounds of the Feistel network. Four is the minimum for large halves; small datasets have few bits per half."""
_64_BITS = 2**64 - 1
_FEW = 32
"""Fewer places are computed faster one by one than as an array."""


class Permutation:
    """A pseudo-random permutation of 0 … size - 1, computed place by place with a Feistel network on the bits.

    M. Luby, C. Rackoff, "How to construct pseudorandom permutations from pseudorandom functions", 1988. An image
    outside the range is mapped again until it falls inside: J. Black, P. Rogaway, "Ciphers with arbitrary finite
    domains", 2002.
    """

    def __init__(self, size: int, *key: int) -> None:
        """`key`: integers that choose the permutation of `size` numbers."""
        self.size = size
        self._half = max(1, -(-(size - 1).bit_length() // 2))
        self._mask = (1 << self._half) - 1
        digest = hashlib.shake_128(repr((size, key)).encode()).digest(8 * _ROUNDS)
        self._keys = struct.unpack(f"<{_ROUNDS}Q", digest)

    def __call__(self, place: int) -> int:
        """The number at a place of the permutation."""
        image = self._encrypt(place)
        while image >= self.size:
            image = self._encrypt(image)
        return image

    def images(self, places: np.ndarray) -> np.ndarray:
        """The numbers [n] at many places [n], all int64."""
        if len(places) < _FEW:
            return np.array([self(place) for place in places.tolist()], np.int64)
        image = self._encrypt(places.astype(np.uint64))
        while (outside := image >= self.size).any():
            image[outside] = self._encrypt(image[outside])
        return image.astype(np.int64)

    def _encrypt[Value: (int, np.ndarray)](self, value: Value) -> Value:
        left, right = value >> self._half, value & self._mask
        for key in self._keys:
            left, right = right, left ^ (_mix(right ^ key) & self._mask)
        return (left << self._half) | right


@dataclass(frozen=True)
class OrderStart:
    """Where a run enters the order, so that the batch size and the sources may change between two of its parts."""

    step: int = 0
    """Finished steps."""
    place: int = 0
    """First place of the next step."""
    turns: tuple[int, ...] = ()
    """Samples of every dataset that come before place 0; empty: none."""


@lru_cache(maxsize=256)
def _permutation(size: int, *key: int) -> Permutation:
    """A step asks the same few permutations for all its places."""
    return Permutation(size, *key)


class Mixture:
    """The endless order over several datasets: every stretch of it holds each dataset by its weight."""

    def __init__(
        self,
        sizes: Sequence[int],
        weights: Sequence[float],
        *,
        seed: int,
        shuffle: bool,
        first_turns: Sequence[int] = (),
    ) -> None:
        """`sizes`: samples of each dataset, numbered one dataset after the other; `weights`: relative shares of places.

        Without `shuffle`, the samples of a dataset come in the order of their numbers. `first_turns`: samples of each
        dataset that come before place 0; empty: none.
        """
        self.first_turns = tuple(first_turns) or (0,) * len(sizes)
        """Samples of each dataset that come before place 0."""
        self._sizes, self._seed, self._shuffle = tuple(sizes), seed, shuffle
        self._first = np.cumsum([0, *sizes])
        self._shares = _shares(weights)
        # The i-th of a dataset's n places lies at (i + 1/2) / n of the period, so every stretch has about its share.
        moments = np.concatenate([(np.arange(share) + 0.5) / share for share in self._shares])
        self._dataset = np.repeat(np.arange(len(sizes)), self._shares)[np.argsort(moments, kind="stable")]
        self._turn = np.empty(len(self._dataset), np.int64)
        for dataset, share in enumerate(self._shares):
            self._turn[self._dataset == dataset] = np.arange(share)

    def turn(self, place: int) -> tuple[int, int]:
        """The dataset at a place, and how many of its samples come before."""
        period, within = divmod(place, len(self._dataset))
        dataset = int(self._dataset[within])
        turn = period * int(self._shares[dataset]) + int(self._turn[within])
        return dataset, self.first_turns[dataset] + turn

    def turns(self, place: int) -> tuple[int, ...]:
        """How many samples of every dataset come before a place."""
        period, within = divmod(place, len(self._dataset))
        counts = period * self._shares + np.bincount(self._dataset[:within], minlength=len(self._shares))
        return tuple(first + int(count) for first, count in zip(self.first_turns, counts, strict=True))

    def sample(self, dataset: int, turn: int, shift: int = 0) -> int:
        """Number of the sample at a dataset's turn, or `shift` turns later in the same pass (which wraps around)."""
        size = self._sizes[dataset]
        epoch, place = divmod(turn, size)
        place = (place + shift) % size
        if self._shuffle:
            place = _permutation(size, self._seed, dataset, epoch)(place)
        return int(self._first[dataset]) + place

    def samples(self, place: int, count: int) -> list[int]:
        """Numbers of the samples at `count` places from `place` on: `sample(*turn(place))` of each, but faster."""
        period, within = np.divmod(np.arange(place, place + count), len(self._dataset))
        dataset = self._dataset[within]
        turn = np.array(self.first_turns)[dataset] + period * self._shares[dataset] + self._turn[within]
        epoch, number = np.divmod(turn, np.array(self._sizes)[dataset])
        if self._shuffle:
            passes, of_pass = np.unique(np.stack([dataset, epoch]), axis=1, return_inverse=True)
            by_pass = np.split(of_pass.argsort(kind="stable"), np.bincount(of_pass).cumsum()[:-1])
            for (of, during), chosen in zip(passes.T.tolist(), by_pass, strict=True):
                number[chosen] = _permutation(self._sizes[of], self._seed, of, during).images(number[chosen])
        numbers: list[int] = (self._first[dataset] + number).tolist()
        return numbers


def take_of_each(sizes: Sequence[int], limit: int | None) -> Sequence[int]:
    """Numbers of `limit` samples: the first of every dataset, in proportion to its size, at least one; None: all.

    `sizes`: samples of each dataset, numbered one dataset after the other; `limit`: at least the number of datasets.
    """
    total = sum(sizes)
    if limit is None or limit >= total or len(sizes) == 1:
        return range(min(total, limit or total))
    exact = [limit * size / total for size in sizes]
    counts = [max(1, math.floor(share)) for share in exact]
    for _ in range(limit - sum(counts)):  # largest remainder
        counts[max(range(len(counts)), key=lambda number: exact[number] - counts[number])] += 1
    for _ in range(sum(counts) - limit):  # what small datasets got beyond their share
        counts[max(range(len(counts)), key=counts.__getitem__)] -= 1
    firsts = itertools.accumulate(sizes, initial=0)
    return [first + place for first, count in zip(firsts, counts, strict=False) for place in range(count)]


def _shares(weights: Sequence[float]) -> np.ndarray:
    """Places of each dataset in a period: proportional to weight (largest remainder method), at least one each."""
    if len(weights) == 1:
        return np.ones(1, np.int64)
    exact = np.array(weights, np.float64) / sum(weights) * _PERIOD
    shares = np.maximum(np.floor(exact), 1).astype(np.int64)
    missing = max(0, _PERIOD - int(shares.sum()))
    shares[np.argsort(np.floor(exact) - exact, kind="stable")[:missing]] += 1
    return shares


def _mix[Value: (int, np.ndarray)](value: Value) -> Value:
    """Hash of 64-bit numbers (finaliser of splitmix64, S. Vigna, public domain)."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _64_BITS
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _64_BITS
    mixed: Value = value ^ (value >> 31)
    return mixed

"""The endless order of samples in training: a pure function of the place, equally fast for any place.

Every pass over a dataset is a new permutation of it; a table assigns the places of the global order to the datasets by
weight. There is no state between places, so resuming costs nothing.
"""

import hashlib
import struct
from collections.abc import Sequence

import numpy as np

_PERIOD = 2**14
"""Places after which the assignment to datasets repeats; the resolution of the weights is one place in a period."""
_ROUNDS = 8
"""Rounds of the Feistel network. Four is the minimum for large halves; small datasets have few bits per half."""
_64_BITS = 2**64 - 1


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

    def _encrypt(self, value: int) -> int:
        left, right = value >> self._half, value & self._mask
        for key in self._keys:
            left, right = right, left ^ (_mix(right ^ key) & self._mask)
        return (left << self._half) | right


class Mixture:
    """The endless order over several datasets: every stretch of it holds each dataset by its weight."""

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], *, seed: int, shuffle: bool) -> None:
        """`sizes`: samples of each dataset, numbered one dataset after the other; `weights`: relative shares of places.

        Without `shuffle`, the samples of a dataset come in the order of their numbers.
        """
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
        return dataset, period * int(self._shares[dataset]) + int(self._turn[within])

    def sample(self, dataset: int, turn: int, shift: int = 0) -> int:
        """Number of the sample at a dataset's turn, or `shift` turns later in the same pass (which wraps around)."""
        size = self._sizes[dataset]
        epoch, place = divmod(turn, size)
        place = (place + shift) % size
        if self._shuffle:
            place = Permutation(size, self._seed, dataset, epoch)(place)
        return int(self._first[dataset]) + place


def _shares(weights: Sequence[float]) -> np.ndarray:
    """Places of each dataset in a period: proportional to weight (largest remainder method), at least one each."""
    if len(weights) == 1:
        return np.ones(1, np.int64)
    exact = np.array(weights, np.float64) / sum(weights) * _PERIOD
    shares = np.maximum(np.floor(exact), 1).astype(np.int64)
    missing = max(0, _PERIOD - int(shares.sum()))
    shares[np.argsort(np.floor(exact) - exact, kind="stable")[:missing]] += 1
    return shares


def _mix(value: int) -> int:
    """Hash of a 64-bit number (finaliser of splitmix64, S. Vigna, public domain)."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _64_BITS
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _64_BITS
    return value ^ (value >> 31)

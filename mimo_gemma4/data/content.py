"""What shards hold, in a few numbers: enough to notice later that the samples are others.

Every document (`.json` member) counts whole. Of media, all sizes count, and a block from the middle of some files.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mimo_gemma4.data.index import ShardIndex
from mimo_gemma4.data.shards import Shard, read_ranges

SAMPLED_FILES = 256
"""Most media files of a shard of which a block is read, evenly spaced."""
SAMPLED_BYTES = 4096
"""Size of such a block."""


@dataclass(frozen=True)
class ShardContent:
    """One shard as a checkpoint records it."""

    name: Shard
    bytes: int
    samples: int
    """Usable samples."""
    documents: str
    """Hash of all documents, in order."""
    media: str
    """Hash of the sizes of all media and of the sampled blocks."""


@dataclass(frozen=True)
class SourceContent:
    """One source as a checkpoint records it."""

    name: str
    weight: float
    samples: int
    """Usable samples."""
    left_out: Mapping[str, int]
    """Samples left out when it was indexed, by fault; `length` are the too long ones."""
    shards: tuple[ShardContent, ...]

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "SourceContent":
        """The source that `dataclasses.asdict` described."""
        return cls(**{**content, "shards": tuple(ShardContent(**shard) for shard in content["shards"])})


def document_hash(document: bytes) -> int:
    """The first 64 bits of the SHA-256 of a `.json` member."""
    return int.from_bytes(hashlib.sha256(document).digest()[:8])


def digest(content: bytes) -> str:
    """SHA-256 of some bytes, its first 128 bits in hexadecimal."""
    return hashlib.sha256(content).hexdigest()[:32]


def media_hash(shard: Shard, index: ShardIndex) -> str:
    """Hash of a shard's media: all sizes, and a block from the middle of up to `SAMPLED_FILES` files.

    Raises `DataError` where the shard cannot be read.
    """
    count = len(index.media_size)
    sampled = np.unique(np.linspace(0, max(0, count - 1), min(count, SAMPLED_FILES)).astype(np.int64))
    sizes = np.minimum(index.media_size[sampled], SAMPLED_BYTES)
    offsets = index.media_offset[sampled] + (index.media_size[sampled] - sizes) // 2
    blocks = read_ranges(shard, list(zip(offsets.tolist(), sizes.tolist(), strict=True)))
    return digest(index.media_size.astype("<i8").tobytes() + b"".join(blocks))

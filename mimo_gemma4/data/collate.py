"""Tensors of one language microbatch."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mimo_gemma4.data.chat import IGNORE, EncodedConversation
from mimo_gemma4.data.dataset import MediaItem
from mimo_gemma4.data.manifest import Microbatch

_ATTENDED_AS_ONE = ("image", "video")
"""Media types whose soft tokens may attend in both directions; audio stays causal (the mask rule of Gemma 4)."""


@dataclass
class LanguageBatch:
    """One microbatch of the language model: whole sequences on the host, all tensors [B, S] int64."""

    input_ids: Tensor
    """Token ids; a soft token has the id of its media type, padding the pad id."""
    labels: Tensor
    """Target of every position, already shifted; -100 at positions without loss."""
    positions: Tensor
    """Position in its sample, from 0; 0 in padding."""
    segments: Tensor
    """Number of the sample in its sequence, from 1; 0 in padding."""
    groups: Tensor
    """Number of the image in its sequence, from 1, at its soft tokens; 0 elsewhere."""


def collate_language(
    microbatch: Microbatch,
    encode: Callable[[int], EncodedConversation],
    media: Callable[[int], tuple[MediaItem, ...]],
    pad_id: int,
) -> LanguageBatch:
    """Lay the encoded samples of a microbatch at their places. `encode` and `media` take a dataset number."""
    shape = (microbatch.sequences, microbatch.seq_length)
    input_ids, labels = np.full(shape, pad_id, np.int64), np.full(shape, IGNORE, np.int64)
    positions, segments, groups = (np.zeros(shape, np.int64) for _ in range(3))
    for sample in microbatch.samples:
        encoded = encode(sample.index)
        where = (sample.sequence, slice(sample.start, sample.start + sample.length))
        input_ids[where], labels[where] = encoded.input_ids, encoded.labels
        positions[where] = np.arange(sample.length)
        segments[where] = segments[sample.sequence].max(initial=0) + 1
        for item in media(sample.index):
            if item.media_type in _ATTENDED_AS_ONE:
                start = sample.start + item.start
                groups[sample.sequence, start : start + item.soft_tokens] = groups[sample.sequence].max(initial=0) + 1
    return LanguageBatch(*map(torch.from_numpy, (input_ids, labels, positions, segments, groups)))

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
    """One microbatch of the language model: whole sequences on the host, all tensors [rows, seq_length] int64."""

    input_ids: Tensor
    """Token ids; media positions hold their soft token's id, padding the pad id."""
    labels: Tensor
    """Target of every position, already shifted; -100 where there is no loss."""
    positions: Tensor
    """Position in its sample, from 0; 0 in padding."""
    segments: Tensor
    """Number of the sample in its row, from 1; 0 in padding."""
    groups: Tensor
    """Number of the image in its row, from 1, at that image's soft tokens; 0 elsewhere."""


def collate_language(
    microbatch: Microbatch,
    encode: Callable[[int], EncodedConversation],
    media: Callable[[int], tuple[MediaItem, ...]],
    pad_id: int,
) -> LanguageBatch:
    """Lay the encoded samples of a microbatch where its manifest says. `encode` and `media` take a dataset number."""
    shape = (microbatch.sequences, microbatch.seq_length)
    input_ids, labels = np.full(shape, pad_id, np.int64), np.full(shape, IGNORE, np.int64)
    positions, segments, groups = (np.zeros(shape, np.int64) for _ in range(3))
    for planned in microbatch.samples:
        encoded = encode(planned.index)
        where = (planned.sequence, slice(planned.start, planned.start + planned.length))
        input_ids[where], labels[where] = encoded.input_ids, encoded.labels
        positions[where] = np.arange(planned.length)
        segments[where] = segments[planned.sequence].max(initial=0) + 1
        for item in media(planned.index):
            if item.media_type in _ATTENDED_AS_ONE:
                start = planned.start + item.start
                groups[planned.sequence, start : start + item.soft_tokens] = groups[planned.sequence].max(initial=0) + 1
    return LanguageBatch(*map(torch.from_numpy, (input_ids, labels, positions, segments, groups)))

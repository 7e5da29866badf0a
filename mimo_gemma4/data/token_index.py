"""Token counts of a shard's samples, for one tokenizer and one set of media processors, kept beside the shard."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Self

import numpy as np

from mimo_gemma4.data.chat import ConversationEncoder
from mimo_gemma4.data.index import ShardIndex
from mimo_gemma4.data.sample import MEDIA_TYPES, parse_messages
from mimo_gemma4.data.shards import read_range
from mimo_gemma4.data.sidecar import load_sidecar, save_sidecar
from mimo_gemma4.errors import DataError


@dataclass(frozen=True)
class TokenIndex:
    """Lengths of the samples of a `ShardIndex`, in its order."""

    length: np.ndarray
    """[samples] int32: tokens, media rows included; 0 for a sample that cannot be encoded."""
    loss_tokens: np.ndarray
    """[samples] int32: positions with a label."""
    media_start: np.ndarray
    """[media] int32: position of the first soft token."""
    media_rows: np.ndarray
    """[media] int32: soft tokens."""
    bad_samples: np.ndarray
    """[bad] int64: samples that cannot be encoded …"""
    bad_reasons: np.ndarray
    """[bad] str: … and why."""

    @classmethod
    def open(cls, shard: Path, index: ShardIndex, encoder: ConversationEncoder) -> Self:
        """The token index of a shard, from its sidecar or by encoding every sample.

        Raises `DataError` if the shard holds media that no module of the layout encodes.
        """
        present = [MEDIA_TYPES[number] for number in np.unique(index.media_type)]
        absent = sorted(set(present) - set(encoder.processors))
        if absent:
            known = ", ".join(sorted(encoder.processors)) or "no media"
            raise DataError(
                f"{shard} holds {absent[0]} files, but the modules of `layout` encode {known}; add a module for "
                f"{absent[0]} to layout or take these samples out of the shards"
            )
        name = f"tokens-{encoder.fingerprint}"
        arrays = load_sidecar(shard, name)
        if arrays is not None and set(arrays) == {field.name for field in fields(cls)}:
            return cls(**arrays)
        tokens = cls.build(shard, index, encoder)
        save_sidecar(shard, name, {field.name: getattr(tokens, field.name) for field in fields(cls)})
        return tokens

    @classmethod
    def build(cls, shard: Path, index: ShardIndex, encoder: ConversationEncoder) -> Self:
        """Encode every sample of a shard. Samples that cannot be encoded are recorded, not raised.

        Raises `DataError` for media that no module of the layout encodes.
        """
        for media_type in sorted({MEDIA_TYPES[number] for number in index.media_type} - set(encoder.processors)):
            raise DataError(
                f"{shard} holds {media_type} files, but `layout` has no module that encodes them: add one, or leave "
                "the shard out"
            )
        length, loss_tokens = np.zeros(len(index), np.int32), np.zeros(len(index), np.int32)
        media_start, media_rows = np.zeros(len(index.media_type), np.int32), np.zeros(len(index.media_type), np.int32)
        bad: list[tuple[int, str]] = []
        for sample in range(len(index)):
            media = index.media_range(sample)
            try:
                rows = [_rows(index, medium, encoder) for medium in media]
                data = read_range(shard, int(index.json_offset[sample]), int(index.json_size[sample]))
                encoded = encoder.encode(parse_messages(data), rows)
            except DataError as error:
                bad.append((sample, str(error)))
                continue
            length[sample], loss_tokens[sample] = encoded.length, encoded.loss_tokens
            media_start[media.start : media.stop] = encoded.media_starts
            media_rows[media.start : media.stop] = rows
        return cls(
            length=length,
            loss_tokens=loss_tokens,
            media_start=media_start,
            media_rows=media_rows,
            bad_samples=np.array([sample for sample, _ in bad], np.int64),
            bad_reasons=np.array([reason for _, reason in bad], np.str_),
        )


def _rows(index: ShardIndex, medium: int, encoder: ConversationEncoder) -> int:
    header = index.header(medium)
    try:
        return encoder.processors[MEDIA_TYPES[index.media_type[medium]]].rows(header)
    except ValueError as error:
        raise DataError(str(error)) from error

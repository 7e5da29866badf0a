"""Token counts of a shard's samples, for one tokenizer and one set of media processors, kept beside the shard."""

from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np

from mimo_gemma4.data.chat import ConversationEncoder, EncodedConversation
from mimo_gemma4.data.index import ShardIndex
from mimo_gemma4.data.sample import MEDIA_TYPES, BadSampleError, Fault, parse_messages
from mimo_gemma4.data.shards import Shard, read_ranges
from mimo_gemma4.data.sidecar import load_sidecar, save_sidecar
from mimo_gemma4.errors import DataError


@dataclass(frozen=True)
class TokenIndex:
    """Lengths of the samples of a `ShardIndex`, in its order."""

    length: np.ndarray
    """[samples] int32: tokens, soft tokens included; 0 for a sample that cannot be encoded."""
    loss_tokens: np.ndarray
    """[samples] int32: positions with a label."""
    media_start: np.ndarray
    """[media] int32: position of the first soft token."""
    media_soft_tokens: np.ndarray
    """[media] int32: soft tokens; 0 for a video's frame that the model does not see."""
    bad_samples: np.ndarray
    """[bad] int64: numbers of the samples that cannot be encoded."""
    bad_faults: np.ndarray
    """[bad] str: their faults (`sample.Fault`)."""
    bad_reasons: np.ndarray
    """[bad] str: what is wrong with them, in words."""

    @classmethod
    def open(cls, shard: Shard, index: ShardIndex, encoder: ConversationEncoder) -> Self:
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
    def build(cls, shard: Shard, index: ShardIndex, encoder: ConversationEncoder) -> Self:
        """Encode every sample of a shard. Samples that cannot be encoded are recorded, not raised."""
        length, loss_tokens = np.zeros(len(index), np.int32), np.zeros(len(index), np.int32)
        media = len(index.media_type)
        media_start, media_soft_tokens = np.zeros(media, np.int32), np.zeros(media, np.int32)
        bad: list[tuple[int, Fault, str]] = []
        documents = read_ranges(shard, list(zip(index.json_offset.tolist(), index.json_size.tolist(), strict=True)))
        for sample, data in enumerate(documents):
            files = index.media_range(sample)
            try:
                messages = parse_messages(data)
                shown = [files[number] for number in encoder.shown_media(messages)]
                soft_tokens = [_soft_tokens(index, medium, encoder) for medium in shown]
                encoded = _encode(encoder, messages, soft_tokens)
            except BadSampleError as error:
                bad.append((sample, error.fault, str(error)))
                continue
            length[sample], loss_tokens[sample] = encoded.length, encoded.loss_tokens
            media_start[shown], media_soft_tokens[shown] = encoded.media_starts, soft_tokens
        return cls(
            length=length,
            loss_tokens=loss_tokens,
            media_start=media_start,
            media_soft_tokens=media_soft_tokens,
            bad_samples=np.array([sample for sample, _, _ in bad], np.int64),
            bad_faults=np.array([fault for _, fault, _ in bad], np.str_),
            bad_reasons=np.array([reason for _, _, reason in bad], np.str_),
        )


def _soft_tokens(index: ShardIndex, medium: int, encoder: ConversationEncoder) -> int:
    header = index.header(medium)
    try:
        return encoder.processors[MEDIA_TYPES[index.media_type[medium]]].soft_tokens(header)
    except ValueError as error:
        raise BadSampleError("soft_tokens", str(error)) from error


def _encode(
    encoder: ConversationEncoder, messages: list[dict[str, Any]], soft_tokens: list[int]
) -> EncodedConversation:
    try:
        return encoder.encode(messages, soft_tokens)
    except DataError as error:
        raise BadSampleError("chat", str(error)) from error

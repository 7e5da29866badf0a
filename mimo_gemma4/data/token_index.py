"""Token counts of a shard's samples, for one tokenizer and one set of media processors, kept beside the shard."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Self

import numpy as np

from mimo_gemma4.data.chat import ConversationEncoder
from mimo_gemma4.data.content import media_hash
from mimo_gemma4.data.index import ShardIndex, progress
from mimo_gemma4.data.sample import MEDIA_TYPES
from mimo_gemma4.data.shards import Shard
from mimo_gemma4.data.sidecar import load_sidecar, remove_sidecar, save_sidecar
from mimo_gemma4.data.token_parts import PART_FIELDS, EncodingProcesses, Part, encode_part, joined, parts_of
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
    document_hash: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))
    """[samples] uint64: hash of every `.json` member (`content.document_hash`)."""
    media_hash: np.ndarray = field(default_factory=lambda: np.array(""))
    """[] str: hash of the media (`content.media_hash`)."""
    left_out: np.ndarray = field(default_factory=lambda: np.zeros(0, np.str_))
    """[names] str: what samples hold and their ids do not (`template.Located.left_out`)."""
    left_out_counts: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """[names] int64: how often."""

    @classmethod
    def open(cls, shard: Shard, index: ShardIndex, encoder: ConversationEncoder) -> Self:
        """The token index of a shard, from its sidecar or by encoding every sample.

        Raises `DataError` if the shard holds media that no module of the layout encodes.
        """
        name = sidecar_name(shard, index, encoder)
        found = cls.load(shard, name)
        if found is not None:
            return found
        tokens = cls.build(shard, index, encoder, name)
        if save_sidecar(shard, name, {field.name: getattr(tokens, field.name) for field in fields(cls)}) is not None:
            for part in parts_of(shard, len(index)):
                remove_sidecar(shard, f"{name}.{part.name}")
        return tokens

    @classmethod
    def load(cls, shard: Shard, name: str) -> Self | None:
        """The token index that is kept as `name`; None if there is none."""
        arrays = load_sidecar(shard, name)
        return cls(**arrays) if arrays is not None and set(arrays) == {field.name for field in fields(cls)} else None

    @classmethod
    def build(cls, shard: Shard, index: ShardIndex, encoder: ConversationEncoder, name: str) -> Self:
        """Encode every sample of a shard. Samples that cannot be encoded are recorded, not raised.

        A large shard is encoded in parts, each of which is kept beside the shard until all are done, as `name` and its
        samples: who is interrupted continues with the next part.
        """
        parts = parts_of(shard, len(index))
        done = []
        for part in progress(parts, len(parts), "encoding") if len(parts) > 1 else parts:
            arrays = load_part(part, name)
            if arrays is None:
                arrays = encode_part(part, index, encoder)
                if len(parts) > 1:
                    save_sidecar(shard, f"{name}.{part.name}", arrays)
            done.append(arrays)
        return cls(**joined(done), media_hash=np.array(media_hash(shard, index)))


def sidecar_name(shard: Shard, index: ShardIndex, encoder: ConversationEncoder) -> str:
    """Name of the file that keeps a token index. Raises `DataError` for media that no module of the layout encodes."""
    present = [MEDIA_TYPES[number] for number in np.unique(index.media_type)]
    absent = sorted(set(present) - set(encoder.processors))
    if absent:
        known = ", ".join(sorted(encoder.processors)) or "no media"
        raise DataError(
            f"{shard} holds {absent[0]} files, but the modules of `layout` encode {known}; add a module for "
            f"{absent[0]} to layout or take these samples out of the shards"
        )
    return f"tokens-{encoder.fingerprint_for(present)}"


def load_part(part: Part, name: str) -> dict[str, np.ndarray] | None:
    """A part that was kept while its shard's index was not whole; None if there is none."""
    arrays = load_sidecar(part.shard, f"{name}.{part.name}")
    return arrays if arrays is not None and set(arrays) == PART_FIELDS else None


def encode_ahead(shards: Sequence[Shard], encoder: ConversationEncoder, workers: int) -> None:
    """Encode and keep all parts of all shards that are not kept yet, in several processes. `open` then joins them."""
    names: dict[Part, str] = {}
    for shard in shards:
        index = ShardIndex.open(shard)
        name = sidecar_name(shard, index, encoder)
        if TokenIndex.load(shard, name) is None:
            parts = [part for part in parts_of(shard, len(index)) if load_part(part, name) is None]
            names |= dict.fromkeys(parts, name)
    if len(names) < 2:
        return
    with EncodingProcesses(encoder, min(workers, len(names))) as processes:
        for part, arrays in progress(processes.encode(list(names)), len(names), "encoding"):
            save_sidecar(part.shard, f"{names[part]}.{part.name}", arrays)


def left_out_text(counts: Mapping[str, int]) -> str:
    """What is left out of samples, for messages: `messages.score (12 samples), thoughts (3)`."""
    named = sorted(counts.items())
    return ", ".join(f"{name} ({count}{'' if name == 'thoughts' else ' samples'})" for name, count in named)

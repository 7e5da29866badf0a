"""The usable samples of all shards, numbered from 0."""

import logging
import zlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from torch import distributed as dist

from mimo_gemma4.data.agreement import BadSamplePolicy, allowed_bad, require_equal
from mimo_gemma4.data.chat import ConversationEncoder, EncodedConversation
from mimo_gemma4.data.content import ShardContent, SourceContent, digest, document_hash
from mimo_gemma4.data.index import ShardIndex, progress
from mimo_gemma4.data.sample import MEDIA_TYPES, Fault, parse_messages
from mimo_gemma4.data.shards import Shard, expand_shards, read_range, require_distinct
from mimo_gemma4.data.token_index import TokenIndex, left_out_text
from mimo_gemma4.distributed.collective_errors import all_ranks_finish_or_raise
from mimo_gemma4.errors import DataError
from mimo_gemma4.media import MediaHeader

logger = logging.getLogger(__name__)

_REPORTED = 5
"""Most samples that are logged one by one when they are left out; the others are only counted."""


@dataclass(frozen=True)
class MediaItem:
    """One media file of a sample."""

    modality: str
    """Encoder of the layout that takes it."""
    media_type: str
    """Type of the chat content."""
    header: MediaHeader
    soft_tokens: int
    """Number of its soft tokens."""
    start: int
    """Position of its first soft token in the sample."""
    shard: Shard
    offset: int
    """First byte in the shard."""
    size: int
    """Bytes."""


@dataclass(frozen=True)
class BadSample:
    """A sample that cannot be trained on."""

    shard: Shard
    key: str
    """`__key__`; empty if the shard itself breaks off."""
    fault: Fault
    reason: str

    def __str__(self) -> str:
        """Shard, key and reason."""
        return f"{self.shard}: {f'__key__ {self.key!r}: ' if self.key else ''}{self.reason}"

    def record(self) -> dict[str, str]:
        """Its fields, for a log file."""
        return asdict(self)


@dataclass(frozen=True)
class Source:
    """Shards that share one weight."""

    shards: str | Path | Sequence[str | Path]
    """As for `expand_shards`."""
    weight: float = 1.0
    """Share of a step's samples, relative to the other sources."""
    name: str = ""
    """For messages; empty for the only source."""


class ShardDataset:
    """Samples 0 … len - 1 of the sources, in shard order. Only lengths and places are in memory."""

    def __init__(
        self,
        sources: Sequence[tuple[Source, int]],
        shards: Sequence[Shard],
        indexes: Sequence[ShardIndex],
        tokens: Sequence[TokenIndex],
        encoder: ConversationEncoder,
        *,
        seq_length: int,
        on_bad_sample: BadSamplePolicy = "fail",
        max_bad_fraction: float = 0.01,
    ) -> None:
        """Number the usable samples; call `open` to read the indexes first.

        Args:
            sources: every source with its number of `shards`, which are in the order of the sources.
            seq_length: samples with more tokens are left out.
            on_bad_sample: `fail` raises `DataError` if a sample must be left out; `skip` counts and logs them.
            max_bad_fraction: with `skip`, a larger fraction of unusable samples raises. Samples that are too long do
                not count.
        """
        self.encoder = encoder
        self.seq_length = seq_length
        self._shards, self._indexes, self._tokens = tuple(shards), tuple(indexes), tuple(tokens)
        usable = [np.flatnonzero((t.length > 0) & (t.length <= seq_length)) for t in tokens]
        self._shard_of = np.repeat(np.arange(len(usable)), [len(numbers) for numbers in usable])
        self._number_in_shard = np.concatenate(usable) if usable else np.zeros(0, np.int64)
        self.lengths = np.concatenate([t.length[numbers] for t, numbers in zip(tokens, usable, strict=True)])
        """[samples] int32: tokens of every sample, soft tokens included."""
        self.loss_tokens = np.concatenate([t.loss_tokens[numbers] for t, numbers in zip(tokens, usable, strict=True)])
        """[samples] int32: positions of every sample that have a label."""
        self._sources = tuple(source for source, _ in sources)
        self.weights = tuple(source.weight for source in self._sources)
        """Weight of every source."""
        self._counts = [count for _, count in sources]
        self._usable = tuple(len(numbers) for numbers in usable)
        remaining = iter(self._usable)
        self.sizes = tuple(sum(islice(remaining, count)) for count in self._counts)
        """Number of samples of every source; they are numbered one source after the other."""
        self.unusable = self._unusable()
        """Samples whose tar members, JSON, media headers or placeholders are wrong."""
        self.too_long = self._too_long()
        """Samples of more than `seq_length` tokens."""
        self._check_bad(on_bad_sample, max_bad_fraction)
        self._warn_left_out()
        self._check_empty_sources()

    @classmethod
    def open(
        cls,
        sources: str | Path | Sequence[str | Path] | Sequence[Source],
        encoder: ConversationEncoder,
        *,
        seq_length: int,
        on_bad_sample: BadSamplePolicy = "fail",
        max_bad_fraction: float = 0.01,
        group: dist.ProcessGroup | None = None,
    ) -> "ShardDataset":
        """Find the shards, index those that are not indexed yet, and number their samples.

        `sources`: the sources to mix, or the shards of a single one. With a host `group`, all its ranks call this: each
        indexes a part of the shards, then all check that they see the same samples. Raises `DataError` on every rank,
        for missing shards, for bad samples as the constructor does, or if the ranks disagree.
        """

        several = _sources(sources)

        def read() -> ShardDataset:
            shards, counts = _expand(several)
            indexes = [ShardIndex.open(shard) for shard in progress(shards, len(shards), "reading index")]
            tokens = [TokenIndex.open(shard, index, encoder) for shard, index in zip(shards, indexes, strict=True)]
            return cls(
                list(zip(several, counts, strict=True)), shards, indexes, tokens, encoder,
                seq_length=seq_length, on_bad_sample=on_bad_sample, max_bad_fraction=max_bad_fraction,
            )  # fmt: skip

        if group is None or group.size() == 1:
            return read()

        def index_part() -> None:
            mine = _expand(several)[0][group.rank() :: group.size()]
            for shard in progress(mine, len(mine), "indexing") if group.rank() == 0 else mine:
                TokenIndex.open(shard, ShardIndex.open(shard), encoder)

        all_ranks_finish_or_raise(group, index_part)
        dataset = all_ranks_finish_or_raise(group, read)
        require_equal(len(dataset), "the number of samples", group)
        require_equal(dataset.fingerprint, "sizes of shards, keys or lengths of samples, or their documents", group)
        return dataset

    def __len__(self) -> int:
        """Number of usable samples."""
        return len(self._number_in_shard)

    def key(self, index: int) -> str:
        """`__key__` of a sample."""
        return self._index(index).key(int(self._number_in_shard[index]))

    def shard(self, index: int) -> Shard:
        """The shard that holds a sample."""
        return self._shards[int(self._shard_of[index])]

    def describe(self, index: int) -> str:
        """Shard and `__key__` of a sample, for messages."""
        return f"{self.shard(index)}: __key__ {self.key(index)!r}"

    def identity(self, index: int, ordinal: int) -> str:
        """Name of a media item that no other item has: key, number and file size."""
        return f"{self.key(index)}#{ordinal}:{self.media(index)[ordinal].size}"

    def media(self, index: int) -> tuple[MediaItem, ...]:
        """Media of a sample that the model sees, in message order; every frame of a video is an item."""
        shard, table, tokens = self.shard(index), self._index(index), self._tokens[self._shard_of[index]]
        items = []
        for medium in table.media_range(int(self._number_in_shard[index])):
            if tokens.media_soft_tokens[medium] == 0:
                continue
            media_type = MEDIA_TYPES[table.media_type[medium]]
            items.append(
                MediaItem(
                    modality=self.encoder.processors[media_type].modality,
                    media_type=media_type,
                    header=table.header(medium),
                    soft_tokens=int(tokens.media_soft_tokens[medium]),
                    start=int(tokens.media_start[medium]),
                    shard=shard,
                    offset=int(table.media_offset[medium]),
                    size=int(table.media_size[medium]),
                )
            )
        return tuple(items)

    def messages(self, index: int) -> list[dict[str, Any]]:
        """Messages of a sample, read from its shard. Raises `DataError`, also for another document than the indexed."""
        table, number = self._index(index), self._number_in_shard[index]
        data = read_range(self.shard(index), int(table.json_offset[number]), int(table.json_size[number]))
        hashes = self._tokens[self._shard_of[index]].document_hash
        if len(hashes) and document_hash(data) != hashes[number]:
            raise DataError(
                f"{self.describe(index)}: its .json member is not the one that was indexed, although the shard has the "
                f"size and time of then; delete {self.shard(index)}.*.npz to index it anew"
            )
        try:
            return parse_messages(data)
        except DataError as error:
            raise DataError(f"{self.describe(index)}: {error}") from error

    def encode(self, index: int) -> EncodedConversation:
        """Tokens of a sample. Raises `DataError` if they differ from the indexed ones."""
        media = self.media(index)
        try:
            encoded = self.encoder.encode(self.messages(index), [item.soft_tokens for item in media])
        except DataError as error:
            raise DataError(f"{self.describe(index)}: {error}") from error
        soft_tokens = [self.encoder.processors[item.media_type].soft_tokens(item.header) for item in media]
        indexed = (int(self.lengths[index]), [item.start for item in media], [item.soft_tokens for item in media])
        read = (encoded.length, list(encoded.media_starts), soft_tokens)
        if indexed != read:
            raise DataError(
                f"{self.describe(index)}: (length, starts of media, soft tokens of media) is {indexed} in the index, "
                f"{read} in the shard; delete {self.shard(index)}.*.npz to index it anew"
            )
        return encoded

    def source(self, index: int) -> int:
        """Number of the source that holds a sample."""
        return int(np.searchsorted(np.cumsum(self.sizes), index, side="right"))

    @cached_property
    def contents(self) -> tuple[SourceContent, ...]:
        """What every source holds, as a checkpoint records it."""
        left_out: dict[Shard, Counter[str]] = defaultdict(Counter)
        for sample in (*self.unusable, *self.too_long):
            left_out[sample.shard][sample.fault] += 1
        shards = iter(
            ShardContent(
                name=shard,
                bytes=int(table.shard_size),
                samples=samples,
                documents=digest(tokens.document_hash.astype("<u8").tobytes()),
                media=str(tokens.media_hash),
            )
            for shard, table, tokens, samples in zip(
                self._shards, self._indexes, self._tokens, self._usable, strict=True
            )
        )
        contents = []
        for source, count, size in zip(self._sources, self._counts, self.sizes, strict=True):
            mine = tuple(islice(shards, count))
            faults = sum((left_out[shard.name] for shard in mine), Counter[str]())
            contents.append(SourceContent(source.name, source.weight, size, dict(sorted(faults.items())), mine))
        return tuple(contents)

    @cached_property
    def fingerprint(self) -> int:
        """Checksum of all shard sizes, keys, lengths and documents, in order: equal on ranks that see the same."""
        sizes = np.array([table.shard_size for table in self._indexes], "<i8")
        checksum = zlib.crc32(sizes.tobytes())
        checksum = zlib.crc32(self.lengths.astype("<i4").tobytes(), checksum)
        for table, tokens in zip(self._indexes, self._tokens, strict=True):
            checksum = zlib.crc32(b"\0".join(table.keys[np.flatnonzero(tokens.length)].tolist()), checksum)
            checksum = zlib.crc32(tokens.document_hash.astype("<u8").tobytes(), checksum)
        return checksum

    def _index(self, index: int) -> ShardIndex:
        return self._indexes[int(self._shard_of[index])]

    def _unusable(self) -> tuple[BadSample, ...]:
        bad = []
        for shard, table, tokens in zip(self._shards, self._indexes, self._tokens, strict=True):
            for key, fault, reason in zip(table.bad_keys, table.bad_faults, table.bad_reasons, strict=True):
                bad.append(BadSample(shard, str(key), fault.item(), str(reason)))
            for number, fault, reason in zip(tokens.bad_samples, tokens.bad_faults, tokens.bad_reasons, strict=True):
                bad.append(BadSample(shard, table.key(int(number)), fault.item(), str(reason)))
        return tuple(bad)

    def _too_long(self) -> tuple[BadSample, ...]:
        bad = []
        for shard, table, tokens in zip(self._shards, self._indexes, self._tokens, strict=True):
            for number in np.flatnonzero(tokens.length > self.seq_length):
                reason = f"{tokens.length[number]} tokens, more than data.seq_length={self.seq_length}"
                bad.append(BadSample(shard, table.key(int(number)), "length", reason))
        return tuple(bad)

    def _check_bad(self, on_bad_sample: BadSamplePolicy, max_bad_fraction: float) -> None:
        """Log the samples that are left out. Raises `DataError` if none may be, or if there are too many."""
        for bad, remedy in (
            (self.unusable, "mend or remove them, or set data.on_bad_sample=skip"),
            (self.too_long, "raise data.seq_length, shorten them, or set data.on_bad_sample=skip"),
        ):
            if not bad:
                continue
            total = len(self) + len(self.unusable) + len(self.too_long)
            if on_bad_sample == "fail":
                count = f"{len(bad)} of {total} samples cannot be used"
                raise DataError(f"{count}; {remedy}. The first: {bad[0]}")
            for sample in bad[:_REPORTED]:
                logger.warning("left out: %s", sample)
            faults = ", ".join(f"{count} {fault}" for fault, count in Counter(s.fault for s in bad).most_common())
            logger.warning("left out %d of %d samples in all (%s)", len(bad), total, faults)
        considered = len(self) + len(self.unusable)
        if len(self.unusable) > allowed_bad(considered, max_bad_fraction):
            raise DataError(
                f"{len(self.unusable)} of {considered} samples cannot be used, more than "
                f"data.max_bad_fraction={max_bad_fraction} allows. The first: {self.unusable[0]}"
            )

    def _warn_left_out(self) -> None:
        """Log what samples hold and their ids do not, with counts."""
        counts = Counter[str]()
        for tokens in self._tokens:
            counts.update(dict(zip(tokens.left_out.tolist(), tokens.left_out_counts.tolist(), strict=True)))
        if counts:
            logger.warning("not trained on, and left out of the samples that hold it: %s", left_out_text(counts))

    def _check_empty_sources(self) -> None:
        """Raise `DataError` for a source without usable samples."""
        empty = [number for number, size in enumerate(self.sizes) if not size]
        if empty:
            start = sum(self._counts[: empty[0]])
            some = self._shards[start : start + self._counts[empty[0]]][:3]
            left_out = [sample for sample in (*self.unusable, *self.too_long) if sample.shard in some]
            first = f"; the first left out: {left_out[0]}" if left_out else ""
            raise DataError(f"{', '.join(some)} hold no usable sample{first}")


def _sources(given: str | Path | Sequence[str | Path] | Sequence[Source]) -> list[Source]:
    if isinstance(given, str | Path):
        return [Source(given)]
    sources = [source for source in given if isinstance(source, Source)]
    shards = [shard for shard in given if not isinstance(shard, Source)]
    return sources if sources and not shards else [*sources, Source(shards)]


def _expand(sources: Sequence[Source]) -> tuple[list[Shard], list[int]]:
    """All shards, and the number of shards of each source. Raises `DataError`, also if two sources share a shard."""
    groups = [expand_shards(source.shards) for source in sources]
    shards = [shard for group in groups for shard in group]
    require_distinct(shards)
    return shards, [len(group) for group in groups]

"""Encodes the samples of a shard part by part, here or in several processes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any, Self

import numpy as np

from mimo_gemma4.data.chat import ConversationEncoder, EncodedConversation
from mimo_gemma4.data.content import document_hash
from mimo_gemma4.data.index import ShardIndex
from mimo_gemma4.data.sample import MEDIA_TYPES, BadSampleError, Fault, parse_messages
from mimo_gemma4.data.shards import Shard, read_ranges
from mimo_gemma4.errors import DataError

SAMPLES_PER_PART = 4096
"""What is encoded before it is kept: some seconds of work."""

PART_FIELDS = {
    "length", "loss_tokens", "media_start", "media_soft_tokens", "bad_samples", "bad_faults", "bad_reasons",
    "document_hash", "left_out", "left_out_counts",
}  # fmt: skip
"""Fields of `TokenIndex` that `encode_part` fills."""


@dataclass(frozen=True)
class Part:
    """Consecutive samples of a shard."""

    shard: Shard
    first: int
    stop: int
    """Number after that of the last sample."""

    @property
    def name(self) -> str:
        """For the file that keeps it."""
        return f"{self.first:09d}-{self.stop:09d}"


def parts_of(shard: Shard, samples: int) -> list[Part]:
    """All parts of a shard, in order; one that is empty if the shard is."""
    firsts = range(0, max(1, samples), SAMPLES_PER_PART)
    return [Part(shard, first, min(first + SAMPLES_PER_PART, samples)) for first in firsts]


def encode_part(part: Part, index: ShardIndex, encoder: ConversationEncoder) -> dict[str, np.ndarray]:
    """The fields of `TokenIndex` for the samples of a part. Samples that cannot be encoded are recorded, not raised."""
    count, medium = part.stop - part.first, int(index.media_first[part.first])
    media = int(index.media_first[part.stop]) - medium
    length, loss_tokens = np.zeros(count, np.int32), np.zeros(count, np.int32)
    media_start, media_soft_tokens = np.zeros(media, np.int32), np.zeros(media, np.int32)
    hashes = np.zeros(count, np.uint64)
    bad: list[tuple[int, Fault, str]] = []
    left_out = Counter[str]()
    mine = slice(part.first, part.stop)
    places = zip(index.json_offset[mine].tolist(), index.json_size[mine].tolist(), strict=True)
    for number, data in enumerate(read_ranges(part.shard, list(places))):
        sample = part.first + number
        files = index.media_range(sample)
        hashes[number] = document_hash(data)
        try:
            messages = parse_messages(data)
            shown = [files[place] for place in encoder.shown_media(messages)]
            soft_tokens = [_soft_tokens(index, file, encoder) for file in shown]
            encoded = _encode(encoder, messages, soft_tokens)
        except BadSampleError as error:
            bad.append((sample, error.fault, str(error)))
            continue
        length[number], loss_tokens[number] = encoded.length, encoded.loss_tokens
        shown_here = np.array(shown, np.int64) - medium
        media_start[shown_here], media_soft_tokens[shown_here] = encoded.media_starts, soft_tokens
        left_out.update(encoded.left_out)
    return {
        "length": length,
        "loss_tokens": loss_tokens,
        "media_start": media_start,
        "media_soft_tokens": media_soft_tokens,
        "bad_samples": np.array([sample for sample, _, _ in bad], np.int64),
        "bad_faults": np.array([fault for _, fault, _ in bad], np.str_),
        "bad_reasons": np.array([reason for _, _, reason in bad], np.str_),
        "document_hash": hashes,
        "left_out": np.array(list(left_out), np.str_),
        "left_out_counts": np.array(list(left_out.values()), np.int64),
    }


def joined(parts: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The fields of all parts of a shard, in order."""
    fields = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    left_out = Counter[str]()
    for name, count in zip(fields["left_out"].tolist(), fields["left_out_counts"].tolist(), strict=True):
        left_out[name] += count
    names = sorted(left_out)
    fields["left_out"] = np.array(names, np.str_)
    fields["left_out_counts"] = np.array([left_out[name] for name in names], np.int64)
    return fields


class EncodingProcesses:
    """Processes that encode parts of indexed shards; a context manager."""

    def __init__(self, encoder: ConversationEncoder, count: int) -> None:
        """Start `count` processes, each with the encoder."""
        context = get_context("spawn")
        self._connections: list[Connection[Any, Any]] = []
        self._processes = []
        for _ in range(count):
            mine, other = context.Pipe()
            process = context.Process(target=_serve, args=(other, encoder), daemon=True)
            process.start()
            other.close()
            self._connections.append(mine)
            self._processes.append(process)

    def __enter__(self) -> Self:
        """The processes."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the processes."""
        for process in self._processes:
            process.terminate()
            process.join()

    def encode(self, parts: Sequence[Part]) -> Iterator[tuple[Part, dict[str, np.ndarray]]]:
        """Every part with its fields, in the order in which they are finished.

        Raises what `encode_part` raises, and `DataError` if a process ends.
        """
        waiting = list(reversed(parts))
        working: dict[Connection[Any, Any], Part] = {}
        idle = list(self._connections)
        while waiting or working:
            while waiting and idle:
                connection = idle.pop()
                working[connection] = part = waiting.pop()
                with suppress(OSError):  # a process that has ended is noticed when it should answer
                    connection.send(part)
            ready = wait(list(working))
            for connection in [connection for connection in working if connection in ready]:
                part = working.pop(connection)
                try:
                    outcome = connection.recv()
                except (EOFError, OSError) as error:
                    raise DataError(f"{part.shard}: a process that encoded samples {part.name} has ended") from error
                if isinstance(outcome, Exception):
                    raise outcome
                idle.append(connection)
                yield part, outcome


def _serve(connection: Connection[Any, Any], encoder: ConversationEncoder) -> None:
    open_index = lru_cache(maxsize=1)(ShardIndex.open)
    while True:
        try:
            part = connection.recv()
        except EOFError:
            return
        try:
            connection.send(encode_part(part, open_index(part.shard), encoder))
        except Exception as error:
            connection.send(error)


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

"""Reads what one rank needs of a global step, ahead of the step, and agrees with the other ranks on corrupt media."""

import logging
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import distributed as dist

from mimo_gemma4.data.agreement import BadSamplePolicy, agree_on_worst, allowed_bad
from mimo_gemma4.data.collate import LanguageBatch, collate_language, mask_sample
from mimo_gemma4.data.manifest import MediaSlot, StepManifest
from mimo_gemma4.data.planner import StepPlanner
from mimo_gemma4.data.shards import read_range
from mimo_gemma4.errors import DataError
from mimo_gemma4.health import together

logger = logging.getLogger(__name__)

_FINE, _SKIPPED, _FATAL = 0, 1, 2
_RECENT = 10_000
"""Of how many samples the share of corrupt ones is taken; the whole dataset where that is smaller."""


@dataclass
class StepData:
    """What one rank needs of a global step, on the host."""

    manifest: StepManifest
    language: dict[int, LanguageBatch]
    """Microbatch number → batch of this rank's language lane, of zero rows where the lane idles; empty off its grid."""
    media: dict[tuple[str, int], dict[str, Any]]
    """(modality, round) → encoder inputs, for the rounds in which this rank's encoder lane has items."""
    skipped: frozenset[int]
    """Global batch positions of the samples that are masked because of corrupt media; equal on all ranks."""
    encoded: dict[str, list[tuple[int, str]]]
    """Modality → (language lane, identity) of every item that this rank's encoder lane was given."""
    expected: list[str]
    """Identities of the items that this rank's language lane waits for."""


@dataclass
class _Prepared:
    """A step as read by this rank alone."""

    manifest: StepManifest | None = None
    language: dict[int, LanguageBatch] = field(default_factory=dict)
    media: dict[tuple[str, int], dict[str, Any]] = field(default_factory=dict)
    encoded: dict[str, list[tuple[int, str]]] = field(default_factory=dict)
    expected: list[str] = field(default_factory=list)
    reasons: dict[int, str] = field(default_factory=dict)
    """Global batch position → why this rank could not decode its media."""
    error: Exception | None = None
    """Anything else that went wrong."""


class StepLoader:
    """Loads steps for one rank. All ranks call `load` with the same steps in the same order."""

    def __init__(
        self,
        planner: StepPlanner,
        *,
        language_lane: int | None,
        encoder_lanes: Mapping[str, int],
        group: dist.ProcessGroup | None = None,
        on_bad_sample: BadSamplePolicy = "fail",
        max_bad_fraction: float = 0.01,
        prefetch: int = 1,
        workers: int = 2,
    ) -> None:
        """`language_lane`: this rank's, None off the language grid; `encoder_lanes`: this rank's, by modality.

        `group`: host group of all ranks, used by `load` in the calling thread only; None for a single process.
        `on_bad_sample`: `skip` masks samples with corrupt media, up to `max_bad_fraction` of the last 10,000 samples
        (of the dataset, if it is smaller; repetitions do not count).
        `prefetch`: steps read ahead in the background; `workers`: threads that decode media.
        """
        self.planner = planner
        self.dataset = planner.dataset
        self.skipped_samples = 0
        """Samples masked so far."""
        self._language_lane, self._encoder_lanes = language_lane, dict(encoder_lanes)
        self._processors = {p.modality: p for p in self.dataset.encoder.processors.values()}
        self._group, self._on_bad_sample, self._max_bad_fraction = group, on_bad_sample, max_bad_fraction
        self._prefetch = prefetch
        self._steps = ThreadPoolExecutor(1, thread_name_prefix="load-step")
        self._decoders = ThreadPoolExecutor(max(1, workers), thread_name_prefix="decode-media")
        self._pending: dict[int, Future[_Prepared]] = {}
        self._recent: deque[tuple[int, frozenset[int]]] = deque()

    def load(self, step: int) -> StepData:
        """The data of a step, counted from 0; starts to read the following ones.

        Raises `DataError` on every rank if one of them cannot read its part, if media are corrupt and
        `on_bad_sample` is `fail`, or if too many samples are corrupt.
        """
        prepared = self._submit(step).result()
        self._pending = {number: future for number, future in self._pending.items() if number > step}
        for following in range(step + 1, step + 1 + self._prefetch):
            if self.planner.steps is None or following < self.planner.steps:
                self._submit(following)
        status = agree_on_worst(self._status(prepared), self._group)
        self._raise_if_fatal(step, prepared, status)
        assert prepared.manifest is not None
        skipped = frozenset(np.flatnonzero(status == _SKIPPED).tolist())
        self._count(prepared, skipped)
        for microbatch in prepared.manifest.microbatches:
            for slot in microbatch.samples:
                if microbatch.lane == self._language_lane and slot.sample in skipped:
                    mask_sample(prepared.language[microbatch.number], slot)
        return StepData(
            prepared.manifest, prepared.language, prepared.media, skipped, prepared.encoded, prepared.expected
        )

    def close(self) -> None:
        """Stop reading ahead."""
        self._steps.shutdown(wait=True, cancel_futures=True)
        self._decoders.shutdown(wait=True, cancel_futures=True)

    def _submit(self, step: int) -> Future[_Prepared]:
        if step not in self._pending:
            self._pending[step] = self._steps.submit(self._prepare, step)
        return self._pending[step]

    def _prepare(self, step: int) -> _Prepared:
        """Read this rank's part of a step. Errors are kept: they are raised when all ranks know of them."""
        prepared = _Prepared()
        try:
            prepared.manifest = self.planner.plan(step)
            self._read_language(prepared.manifest, prepared)
            self._read_media(prepared.manifest, prepared)
        except Exception as error:
            prepared.error = error
        return prepared

    def _read_language(self, manifest: StepManifest, prepared: _Prepared) -> None:
        if self._language_lane is None:
            return
        for number in range(manifest.rounds):
            microbatch = manifest.microbatch(self._language_lane, number)
            prepared.language[number] = collate_language(
                microbatch, self.dataset.encode, self.dataset.media, self.dataset.encoder.pad_id
            )
            for slot in microbatch.samples:
                media = range(len(self.dataset.media(slot.index)))
                prepared.expected += [self.dataset.identity(slot.index, ordinal) for ordinal in media]

    def _read_media(self, manifest: StepManifest, prepared: _Prepared) -> None:
        for modality, lane in self._encoder_lanes.items():
            for number in range(manifest.rounds):
                slots = manifest.encoded(modality, number, lane)
                if not slots:
                    continue
                items = []
                for slot, (item, reason) in zip(slots, self._decoders.map(self._decode, slots), strict=True):
                    items.append(item)
                    if reason is not None:
                        prepared.reasons[slot.sample] = reason
                prepared.media[modality, number] = self._processors[modality].collate(items)
                prepared.encoded.setdefault(modality, []).extend(
                    (slot.lane, self.dataset.identity(slot.index, slot.ordinal)) for slot in slots
                )

    def _decode(self, slot: MediaSlot) -> tuple[dict[str, torch.Tensor], str | None]:
        """Tensors of a media item and None; or zeros in their place and why the file is corrupt."""
        item, processor = self.dataset.media(slot.index)[slot.ordinal], self._processors[slot.modality]
        data = read_range(item.shard, item.offset, item.size)
        try:
            return processor.decode(data), None
        except (ValueError, OSError) as error:
            return processor.placeholder(item.header), f"media {slot.ordinal} ({item.media_type}): {error}"

    def _status(self, prepared: _Prepared) -> np.ndarray:
        """[global_batch_size + 1] uint8: what this rank holds of each sample, and last, of reading as a whole."""
        status = np.full(self.planner.global_batch_size + 1, _FINE, np.uint8)
        status[list(prepared.reasons)] = _FATAL if self._on_bad_sample == "fail" else _SKIPPED
        if prepared.error is not None:
            status[-1] = _FATAL
        return status

    def _raise_if_fatal(self, step: int, prepared: _Prepared, status: np.ndarray) -> None:
        """Where `status`, equal on all ranks, is fatal, raise what went wrong on every rank, whoever found it."""
        fatal = np.flatnonzero(status == _FATAL)
        if not len(fatal):
            return

        def fail() -> None:
            if prepared.error is not None:
                raise prepared.error
            for sample in fatal.tolist():
                if sample in prepared.reasons:
                    assert prepared.manifest is not None
                    where = self.dataset.describe(prepared.manifest.samples[sample].index)
                    reason = prepared.reasons[sample]
                    raise DataError(f"{where}: {reason}; mend or remove it, or set data.on_bad_sample=skip")

        together(self._group, fail)
        raise AssertionError(f"step {step}: ranks agreed on a failure that none of them has")

    def _count(self, prepared: _Prepared, skipped: frozenset[int]) -> None:
        """Log and count masked samples; the same on every rank. Raises `DataError` if they are too many."""
        assert prepared.manifest is not None
        samples = prepared.manifest.samples
        for sample in sorted(skipped):
            if sample in prepared.reasons:
                where = self.dataset.describe(samples[sample].index)
                logger.warning("step %d: masked %s: %s", prepared.manifest.step, where, prepared.reasons[sample])
        self.skipped_samples += len(skipped)
        self._recent.append((len(samples), frozenset(samples[sample].index for sample in skipped)))
        while sum(count for count, _ in self._recent) - self._recent[0][0] >= _RECENT:
            self._recent.popleft()
        bad = frozenset().union(*(indexes for _, indexes in self._recent))
        considered = min(len(self.dataset), _RECENT)
        if len(bad) > allowed_bad(considered, self._max_bad_fraction):
            raise DataError(
                f"{len(bad)} samples met so far have corrupt media, more than data.max_bad_fraction="
                f"{self._max_bad_fraction} of {considered} allows; one is {self.dataset.describe(min(bad))}"
            )

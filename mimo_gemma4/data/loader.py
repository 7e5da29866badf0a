"""Reads one rank's part of a global step, ahead of the step, and agrees with the other ranks on corrupt media.

A media file is known to be corrupt only after a rank has tried to decode it. So the ranks read a step, exchange the
numbers of its bad samples, plan the step again with replacements, and read those, until all samples are good. This runs
in the background, on a host group of its own, while earlier steps are trained on. The result depends only on the data:
not on which rank found a bad sample, nor on whether the run was resumed.
"""

import logging
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import distributed as dist

from mimo_gemma4.data.agreement import BadSamplePolicy, allowed_bad
from mimo_gemma4.data.chat import EncodedConversation
from mimo_gemma4.data.collate import LanguageBatch, collate_language
from mimo_gemma4.data.dataset import BadSample
from mimo_gemma4.data.manifest import PlannedMedia, StepManifest
from mimo_gemma4.data.planner import StepPlanner
from mimo_gemma4.data.sample import media_fault
from mimo_gemma4.data.shards import read_range
from mimo_gemma4.distributed.collective_errors import all_ranks_or_raise, highest
from mimo_gemma4.errors import DataError

logger = logging.getLogger(__name__)

_RECENT = 10_000
"""Number of last samples over which the fraction of corrupt ones is taken, or the whole dataset if it is smaller."""


@dataclass
class StepData:
    """One rank's part of a global step, on the host."""

    manifest: StepManifest
    language: dict[int, LanguageBatch]
    """By microbatch: the batch of this rank's language lane (no sequences if it idles); empty without such a lane."""
    media: dict[tuple[str, int], dict[str, Any]]
    """By (module, microbatch): inputs of an encoder or targets of a decoder, if this rank's lane has items."""
    items: dict[str, list[tuple[int, str]]]
    """By module: (language lane, identity) of every item of this rank's lane of an encoder or decoder."""
    expected: list[str]
    """Identities of the items of this rank's language lane, once per module that works on them."""


@dataclass
class _Reading:
    """The parts of a step that this rank has read so far."""

    conversations: dict[int, EncodedConversation] = field(default_factory=dict)
    """By dataset number."""
    media: dict[tuple[str, int, int], dict[str, torch.Tensor]] = field(default_factory=dict)
    """Tensors of the good media, by (module, dataset number, ordinal)."""
    bad: dict[int, BadSample] = field(default_factory=dict)
    """Samples with media that cannot be decoded, by dataset number."""


class StepLoader:
    """Loads steps for one rank. All ranks call `load` with the same steps in the same order."""

    def __init__(
        self,
        planner: StepPlanner,
        *,
        language_lane: int | None,
        encoder_lanes: Mapping[str, int],
        decoder_lanes: Mapping[str, int] | None = None,
        group: dist.ProcessGroup | None = None,
        on_bad_sample: BadSamplePolicy = "fail",
        max_bad_fraction: float = 0.01,
        prefetch: int = 1,
        workers: int = 2,
        stop: int | None = None,
    ) -> None:
        """Load for the given lanes, which are this rank's.

        Args:
            language_lane: None if the rank has none.
            encoder_lanes: by modality.
            decoder_lanes: by name.
            group: host group of all ranks, for the loading thread alone; None for a single process.
            on_bad_sample: `skip` replaces samples with corrupt media, `fail` raises.
            max_bad_fraction: with `skip`, a larger fraction of corrupt samples raises. It is taken over the last 10,000
                samples, or over the dataset if that is smaller; repeated samples count once.
            prefetch: steps read ahead in the background.
            workers: threads that decode media; 0: the loading thread does.
            stop: first step that will not be loaded; None: the end of the planner's pass.
        """
        self.planner = planner
        self.dataset = planner.dataset
        self.bad: dict[int, BadSample] = {}
        """Samples with corrupt media found so far, by dataset number; equal on all ranks."""
        self._language_lane, self._media_lanes = language_lane, {**encoder_lanes, **(decoder_lanes or {})}
        self._collates = {p.modality: p.collate for p in self.dataset.encoder.processors.values()}
        for name, decoder in planner.decoders.items():
            self._collates[name] = next(iter(decoder.processors.values())).collate
        self._group, self._on_bad_sample, self._max_bad_fraction = group, on_bad_sample, max_bad_fraction
        self._prefetch, self._stop = prefetch, planner.steps if stop is None else stop
        self._steps = ThreadPoolExecutor(1, thread_name_prefix="load-step")
        self._decoders = ThreadPoolExecutor(workers, thread_name_prefix="decode-media") if workers else None
        self._pending: dict[int, Future[StepData]] = {}
        self._recent: deque[tuple[int, frozenset[int]]] = deque()

    def load(self, step: int) -> StepData:
        """The data of a step, counted from 0. Starts to read the following steps.

        Raises `DataError` on every rank if one of them cannot read its part, if media are corrupt and
        `on_bad_sample` is `fail`, or if too many samples are corrupt.
        """
        data = self._submit(step).result()
        self._pending = {number: future for number, future in self._pending.items() if number > step}
        for following in range(step + 1, step + 1 + self._prefetch):
            if self._stop is None or following < self._stop:
                self._submit(following)
        return data

    def faults(self, manifest: StepManifest) -> dict[str, int]:
        """Number of skipped samples of a step, by fault."""
        return dict(Counter(self.bad[index].fault for index in manifest.skipped_samples))

    def close(self) -> None:
        """Stop reading ahead. Steps in progress are finished first, as other ranks may wait for this one."""
        self._steps.shutdown(wait=True)
        if self._decoders is not None:
            self._decoders.shutdown(wait=True)

    def _submit(self, step: int) -> Future[StepData]:
        if step not in self._pending:
            self._pending[step] = self._steps.submit(self._prepare, step)
        return self._pending[step]

    def _prepare(self, step: int) -> StepData:
        """Read this rank's part of a step. Collective, in the loading thread."""
        reading = _Reading()
        manifest = self._read_good(step, reading)
        return all_ranks_or_raise(self._group, lambda: self._collate(manifest, reading))

    def _read_good(self, step: int, reading: _Reading) -> StepManifest:
        """Read the step, and plan it again, until no rank finds a bad sample."""
        while True:
            manifest = all_ranks_or_raise(self._group, lambda: self._read(step, reading))
            found = self._share(reading.bad)
            self._record_bad(manifest, found)
            if not found:
                return manifest
            for sample in reading.bad.values():
                logger.warning("step %d: skipped %s", step, sample)
            reading.bad.clear()

    def _read(self, step: int, reading: _Reading) -> StepManifest:
        """Plan the step without the known bad samples, and read what has not been read yet."""
        manifest = self.planner.plan(step, self.bad)
        for index in (sample.index for sample in manifest.samples if sample.lane == self._language_lane):
            if index not in reading.conversations:
                reading.conversations[index] = self.dataset.encode(index)
        media = {_key(item): item for item in self._media_here(manifest)}
        missing = [item for key, item in media.items() if key not in reading.media]
        decode = map if self._decoders is None else self._decoders.map
        for item, decoded in zip(missing, decode(self._decode, missing), strict=True):
            if isinstance(decoded, BadSample):
                reading.bad[item.index] = decoded
            else:
                reading.media[_key(item)] = decoded
        return manifest

    def _media_here(self, manifest: StepManifest) -> Iterator[PlannedMedia]:
        """The media that this rank's lanes of encoders and decoders work on."""
        for module, lane in self._media_lanes.items():
            for number in range(manifest.num_microbatches):
                yield from manifest.items_of_module(module, number, lane)

    def _decode(self, item: PlannedMedia) -> dict[str, torch.Tensor] | BadSample:
        """Tensors of a media item, or its sample as bad if it cannot be decoded."""
        file = self.dataset.media(item.index)[item.ordinal]
        processor = self.planner.processor(item.module, file.media_type)
        data = read_range(file.shard, file.offset, file.size)
        try:
            tensors = processor.decode(data)
            expected = processor.placeholder(file.header)
            shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
            promised = {name: tuple(tensor.shape) for name, tensor in expected.items()}
            if shapes != promised:
                raise ValueError(f"it holds {shapes}, but its header promises {promised}")
        except (ValueError, OSError) as error:
            fault = media_fault(file.media_type, error)
            reason = f"media {item.ordinal} ({file.media_type}): {error}"
            return BadSample(file.shard, self.dataset.key(item.index), fault, reason)
        return tensors

    def _share(self, bad: dict[int, BadSample]) -> dict[int, BadSample]:
        """The bad samples of all ranks, the same on every rank. Collective."""
        if not highest(len(bad), self._group):
            return {}
        if self._group is None:
            return dict(bad)
        everyone: list[dict[int, BadSample]] = [{} for _ in range(self._group.size())]
        dist.all_gather_object(everyone, bad, group=self._group)
        return {index: sample for found in reversed(everyone) for index, sample in found.items()}

    def _record_bad(self, manifest: StepManifest, found: dict[int, BadSample]) -> None:
        """Record bad samples. Raises `DataError`, on all ranks, if none may be skipped or there are too many."""
        if found and self._on_bad_sample == "fail":
            raise DataError(f"{found[min(found)]}; mend or remove it, or set data.on_bad_sample=skip")
        self.bad.update(found)
        bad = frozenset(found) | frozenset(manifest.skipped_samples)
        if not found:
            self._recent.append((len(manifest.samples), bad))
            while sum(count for count, _ in self._recent) - self._recent[0][0] >= _RECENT:
                self._recent.popleft()
        recent = bad.union(*(indexes for _, indexes in self._recent))
        considered = min(len(self.dataset), _RECENT)
        if len(recent) > allowed_bad(considered, self._max_bad_fraction):
            raise DataError(
                f"{len(recent)} samples met so far have corrupt media, more than data.max_bad_fraction="
                f"{self._max_bad_fraction} of {considered} allows; one is {self.bad[min(recent)]}"
            )

    def _collate(self, manifest: StepManifest, reading: _Reading) -> StepData:
        """Tensors of the step."""
        data = StepData(manifest, {}, {}, {}, [])
        if self._language_lane is not None:
            for number in range(manifest.num_microbatches):
                microbatch = manifest.microbatch(self._language_lane, number)
                data.language[number] = collate_language(
                    microbatch, reading.conversations.__getitem__, self.dataset.media, self.dataset.encoder.pad_id
                )
                for sample in microbatch.samples:
                    for ordinal, item in enumerate(self.dataset.media(sample.index)):
                        modules = self.planner.modules_for(item.modality)
                        data.expected += [self.dataset.identity(sample.index, ordinal)] * len(modules)
        for module, lane in self._media_lanes.items():
            for number in range(manifest.num_microbatches):
                items = manifest.items_of_module(module, number, lane)
                if items:
                    data.media[module, number] = self._collates[module]([reading.media[_key(item)] for item in items])
                    identities = [(item.lane, self.dataset.identity(item.index, item.ordinal)) for item in items]
                    data.items.setdefault(module, []).extend(identities)
        return data


def _key(item: PlannedMedia) -> tuple[str, int, int]:
    """Key of a media item in `_Reading.media`."""
    return item.module, item.index, item.ordinal

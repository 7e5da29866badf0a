"""Reads what one rank needs of a global step, ahead of the step, and agrees with the other ranks on corrupt media.

Whether a media file can be decoded is known only once a rank has decoded it. So the ranks read a step, tell one another
which of its samples are bad, plan it anew with others in their places, and read those, until all is good. That takes
place in the background, on a host group of its own, while earlier steps are trained on. The outcome depends on the data
alone: not on which rank found what, nor on what happened before a run was resumed.
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
"""Of how many samples the share of corrupt ones is taken; the whole dataset where that is smaller."""


@dataclass
class StepData:
    """What one rank needs of a global step, on the host."""

    manifest: StepManifest
    language: dict[int, LanguageBatch]
    """Microbatch number → batch of this rank's language lane, without sequences where it idles; empty off its grid."""
    media: dict[tuple[str, int], dict[str, Any]]
    """(module, microbatch number) → inputs of an encoder, or targets of a decoder, where this rank's lane has items."""
    items: dict[str, list[tuple[int, str]]]
    """Module → (language lane, identity) of every item that this rank's lane of an encoder or decoder was given."""
    expected: list[str]
    """Identities of the items of this rank's language lane, once for each module that works on them."""


@dataclass
class _Reading:
    """What this rank has read for a step so far."""

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
        """`language_lane`: this rank's, None off the language grid; `encoder_lanes`: this rank's, by modality;
        `decoder_lanes`: this rank's, by name.

        `group`: host group of all ranks that nothing else uses, as the loading thread talks on it; None for a single
        process. `on_bad_sample`: `skip` replaces samples with corrupt media, up to `max_bad_fraction` of the last
        10,000 samples (of the dataset, if it is smaller; repetitions do not count).
        `prefetch`: steps read ahead in the background; `workers`: threads that decode media, 0: the loading thread.
        `stop`: the first step that will not be asked for.
        """
        self.planner = planner
        self.dataset = planner.dataset
        self.bad: dict[int, BadSample] = {}
        """Samples with corrupt media met so far, by dataset number; equal on all ranks."""
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
        """The data of a step, counted from 0; starts to read the following ones.

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
        """How many samples were passed over for a step, by what is wrong with them."""
        return dict(Counter(self.bad[index].fault for index in manifest.skipped_samples))

    def close(self) -> None:
        """Stop reading ahead. What has been started is finished: other ranks may wait for this one's part in it."""
        self._steps.shutdown(wait=True)
        if self._decoders is not None:
            self._decoders.shutdown(wait=True)

    def _submit(self, step: int) -> Future[StepData]:
        if step not in self._pending:
            self._pending[step] = self._steps.submit(self._prepare, step)
        return self._pending[step]

    def _prepare(self, step: int) -> StepData:
        """Read this rank's part of a step; in the loading thread of all ranks at once."""
        reading = _Reading()
        manifest = self._read_good(step, reading)
        return all_ranks_or_raise(self._group, lambda: self._collate(manifest, reading))

    def _read_good(self, step: int, reading: _Reading) -> StepManifest:
        """Read, and plan anew, until no rank finds a bad sample."""
        while True:
            manifest = all_ranks_or_raise(self._group, lambda: self._read(step, reading))
            found = self._share(reading.bad)
            self._judge(manifest, found)
            if not found:
                return manifest
            for sample in reading.bad.values():
                logger.warning("step %d: left out %s", step, sample)
            reading.bad.clear()

    def _read(self, step: int, reading: _Reading) -> StepManifest:
        """Plan the step without the samples known to be bad, and read what has not been read yet."""
        manifest = self.planner.plan(step, self.bad)
        for index in (sample.index for sample in manifest.samples if sample.lane == self._language_lane):
            if index not in reading.conversations:
                reading.conversations[index] = self.dataset.encode(index)
        media = {_key(planned): planned for planned in self._media_here(manifest)}
        missing = [planned for key, planned in media.items() if key not in reading.media]
        decode = map if self._decoders is None else self._decoders.map
        for planned, item in zip(missing, decode(self._decode, missing), strict=True):
            if isinstance(item, BadSample):
                reading.bad[planned.index] = item
            else:
                reading.media[_key(planned)] = item
        return manifest

    def _media_here(self, manifest: StepManifest) -> Iterator[PlannedMedia]:
        """The media that this rank's lanes of encoders and decoders work on."""
        for module, lane in self._media_lanes.items():
            for number in range(manifest.num_microbatches):
                yield from manifest.items_of_module(module, number, lane)

    def _decode(self, planned: PlannedMedia) -> dict[str, torch.Tensor] | BadSample:
        """Tensors of a media item, or why it cannot be had."""
        item = self.dataset.media(planned.index)[planned.ordinal]
        processor = self.planner.processor(planned.module, item.media_type)
        data = read_range(item.shard, item.offset, item.size)
        try:
            tensors = processor.decode(data)
            expected = processor.placeholder(item.header)
            shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
            promised = {name: tuple(tensor.shape) for name, tensor in expected.items()}
            if shapes != promised:
                raise ValueError(f"it holds {shapes}, but its header promises {promised}")
        except (ValueError, OSError) as error:
            fault = media_fault(item.media_type, error)
            reason = f"media {planned.ordinal} ({item.media_type}): {error}"
            return BadSample(item.shard, self.dataset.key(planned.index), fault, reason)
        return tensors

    def _share(self, bad: dict[int, BadSample]) -> dict[int, BadSample]:
        """What all ranks found to be bad, the same everywhere. Collective."""
        if not highest(len(bad), self._group):
            return {}
        if self._group is None:
            return dict(bad)
        everyone: list[dict[int, BadSample]] = [{} for _ in range(self._group.size())]
        dist.all_gather_object(everyone, bad, group=self._group)
        return {index: sample for found in reversed(everyone) for index, sample in found.items()}

    def _judge(self, manifest: StepManifest, found: dict[int, BadSample]) -> None:
        """Remember what was found. Raises `DataError`, alike on all ranks, if it must not be or is too much."""
        if found and self._on_bad_sample == "fail":
            raise DataError(f"{found[min(found)]}; mend or remove it, or set data.on_bad_sample=skip")
        self.bad.update(found)
        bad = frozenset(found) | frozenset(manifest.skipped_samples)
        if not found:
            self._recent.append((len(manifest.samples), bad))
            while sum(count for count, _ in self._recent) - self._recent[0][0] >= _RECENT:
                self._recent.popleft()
        met = bad.union(*(indexes for _, indexes in self._recent))
        considered = min(len(self.dataset), _RECENT)
        if len(met) > allowed_bad(considered, self._max_bad_fraction):
            raise DataError(
                f"{len(met)} samples met so far have corrupt media, more than data.max_bad_fraction="
                f"{self._max_bad_fraction} of {considered} allows; one is {self.bad[min(met)]}"
            )

    def _collate(self, manifest: StepManifest, reading: _Reading) -> StepData:
        """Tensors of the step from what has been read."""
        data = StepData(manifest, {}, {}, {}, [])
        if self._language_lane is not None:
            for number in range(manifest.num_microbatches):
                microbatch = manifest.microbatch(self._language_lane, number)
                data.language[number] = collate_language(
                    microbatch, reading.conversations.__getitem__, self.dataset.media, self.dataset.encoder.pad_id
                )
                for sample in microbatch.samples:
                    for ordinal, item in enumerate(self.dataset.media(sample.index)):
                        users = self.planner.modules_for(item.modality)
                        data.expected += [self.dataset.identity(sample.index, ordinal)] * len(users)
        for module, lane in self._media_lanes.items():
            for number in range(manifest.num_microbatches):
                items = manifest.items_of_module(module, number, lane)
                if items:
                    data.media[module, number] = self._collates[module]([reading.media[_key(item)] for item in items])
                    worked_on = data.items.setdefault(module, [])
                    worked_on += [(item.lane, self.dataset.identity(item.index, item.ordinal)) for item in items]
        return data


def _key(planned: PlannedMedia) -> tuple[str, int, int]:
    """What tells a media item of a module from all others of the dataset."""
    return planned.module, planned.index, planned.ordinal

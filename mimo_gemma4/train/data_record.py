"""What a checkpoint records of the data that a run trained on, and where in the data a resumed run goes on."""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mimo_gemma4.checkpoint.files import read_marker
from mimo_gemma4.config import Config
from mimo_gemma4.data.content import ShardContent, SourceContent
from mimo_gemma4.data.dataset import ShardDataset
from mimo_gemma4.data.loader import StepLoader
from mimo_gemma4.data.manifest import StepManifest
from mimo_gemma4.data.order import Mixture, OrderStart
from mimo_gemma4.errors import ConfigError

logger = logging.getLogger(__name__)

_SHOWN = 3
"""Shards named in a message for each source."""


@dataclass(frozen=True)
class SourceRecord:
    """One source, and what the run has used of it."""

    content: SourceContent
    consumed: int
    """Its samples in all finished steps."""
    skipped: Mapping[str, int]
    """Those with corrupt media that were replaced, by fault."""
    first_turn: int
    """Samples of its order that come before place 0 of the order over all sources."""


@dataclass(frozen=True)
class DataRecord:
    """The data of a run up to a checkpoint."""

    seed: int
    batch_size: int
    seq_length: int
    place: int
    """Place in the order of the next step's first sample."""
    sources: tuple[SourceRecord, ...]

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "DataRecord":
        """The record that `dataclasses.asdict` described."""
        sources = [{**source, "content": SourceContent.from_json(source["content"])} for source in record["sources"]]
        return cls(**{**record, "sources": tuple(SourceRecord(**source) for source in sources)})

    def turns(self) -> tuple[int, ...]:
        """By source, the samples of its order that come before the next step."""
        contents = [source.content for source in self.sources]
        mixture = Mixture(
            [content.samples for content in contents],
            [content.weight for content in contents],
            seed=self.seed,
            shuffle=True,
            first_turns=[source.first_turn for source in self.sources],
        )
        return mixture.turns(self.place)


@dataclass(frozen=True)
class DataPoint:
    """Where a run enters its data."""

    start: OrderStart = field(default_factory=OrderStart)
    earlier: tuple[SourceRecord | None, ...] | None = None
    """For every source, its record in the checkpoint, if it has one. None: a new run, or a checkpoint without one."""


class DataProgress:
    """Keeps account of the samples that a run uses."""

    def __init__(self, config: Config, loader: StepLoader, earlier: Sequence[SourceRecord | None] | None) -> None:
        """Go on from the records of the checkpoint that the run resumed from (`DataPoint.earlier`)."""
        self._config, self._loader, planner = config, loader, loader.planner
        first = planner.turns(planner.start.step)
        if earlier is None:  # samples before the start, if any, are taken to be those of this configuration
            self._before = [0] * len(first)
            earlier = [None] * len(first)
        else:
            used = [0 if source is None else source.consumed for source in earlier]
            self._before = [consumed - turns for consumed, turns in zip(used, first, strict=True)]
        self._skipped = [Counter(source.skipped if source else {}) for source in earlier]

    def count_skipped(self, manifest: StepManifest) -> None:
        """Count the skipped samples of a finished step."""
        for index in manifest.skipped_samples:
            self._skipped[self._loader.dataset.source(index)][self._loader.bad[index].fault] += 1

    def record(self, step: int) -> dict[str, Any]:
        """The `DataRecord`, as JSON, of a checkpoint after `step` steps."""
        config, planner, dataset = self._config, self._loader.planner, self._loader.dataset
        turns, first_turns = planner.turns(step), planner.start.turns or (0,) * len(dataset.contents)
        sources = [
            SourceRecord(content, before + turn, dict(sorted(skipped.items())), first_turn)
            for content, before, turn, skipped, first_turn in zip(
                dataset.contents, self._before, turns, self._skipped, first_turns, strict=True
            )
        ]
        record = DataRecord(
            seed=config.run.seed,
            batch_size=config.train.global_batch_size,
            seq_length=config.data.seq_length,
            place=planner.place(step),
            sources=tuple(sources),
        )
        return asdict(record)


def resume_data(config: Config, dataset: ShardDataset, path: Path, *, report: bool) -> DataPoint:
    """Where a run that resumes from the checkpoint `path` enters its data; with `report`, say what has changed.

    Raises `ConfigError` for other data than recorded, unless `checkpoint.resume_data` is `continue`.
    """
    marker = read_marker(path)
    if isinstance(marker, str) or marker.get("weights_only"):
        return DataPoint()  # loading reports a damaged checkpoint; a converted one begins at step 0
    step, batch_size = int(marker["trainer"]["step"]), config.train.global_batch_size
    if "data" not in marker["trainer"]:
        if report and step:
            logger.warning(
                f"checkpoint.resume: {path} does not record its data. The run goes on at sample {step * batch_size} of "
                "the order, which is right if data.train, data.seq_length, run.seed and train.global_batch_size are as "
                "they were"
            )
        return DataPoint(OrderStart(step, step * batch_size))
    before = DataRecord.from_json(marker["trainer"]["data"])
    if report and before.batch_size != batch_size:
        print(
            f"train.global_batch_size is {batch_size}, was {before.batch_size}: step {step + 1} goes on with the next "
            f"sample, after {sum(source.consumed for source in before.sources)}",
            flush=True,
        )
    changes = list(differences(before, config, dataset.contents))
    if not changes:
        start = OrderStart(step, before.place, tuple(source.first_turn for source in before.sources))
        return DataPoint(start, before.sources)
    said = "; ".join(changes)
    if config.checkpoint.resume_data == "strict":
        raise ConfigError(
            f"checkpoint.resume: {path} was trained on other data: {said}. Undo the change, or set "
            "checkpoint.resume_data=continue to go on with the data as they are now"
        )
    point, passes = continued(before, config, dataset.contents, step)
    if report:
        logger.warning(f"checkpoint.resume_data=continue: {path} was trained on other data: {said}. {passes}")
    return point


def continued(
    before: DataRecord, config: Config, contents: Sequence[SourceContent], step: int
) -> tuple[DataPoint, str]:
    """Where changed data are entered, and what that means in words.

    A source goes on at its next sample where its order is the same: equal name, number, seed and count of samples. Any
    other begins a new pass.
    """
    recorded = {source.content.name: (number, source) for number, source in enumerate(before.sources)}
    turns_before = before.turns()
    turns: list[int] = []
    on: list[str] = []
    anew: list[str] = []
    for number, content in enumerate(contents):
        old_number, old = recorded.get(content.name, (None, None))
        turn = 0 if old_number is None else turns_before[old_number]
        same_size = old is not None and old.content.samples == content.samples
        if same_size and old_number == number and before.seed == config.run.seed:
            on.append(content.name or "data.train")
        else:
            anew.append(content.name or "data.train")
            turn = 0 if old is None else (turn // old.content.samples + 1) * content.samples
        turns.append(turn)
    passes = [f"{', '.join(on)}: on at the next sample"] if on else []
    passes += [f"{', '.join(anew)}: a new pass"] if anew else []
    earlier = tuple(recorded.get(content.name, (None, None))[1] for content in contents)
    return DataPoint(OrderStart(step, 0, tuple(turns)), earlier), "; ".join(passes)


def differences(before: DataRecord, config: Config, contents: Sequence[SourceContent]) -> Iterator[str]:
    """What differs from the recorded data, in words. Names and folders of shards may change."""
    for key, was, value in (
        ("run.seed", before.seed, config.run.seed),
        ("data.seq_length", before.seq_length, config.data.seq_length),
    ):
        if was != value:
            yield f"{key} is {value}, was {was}"
    recorded = [source.content for source in before.sources]
    if len(recorded) != len(contents):
        yield f"data.train has {_names(contents)}, had {_names(recorded)}"
        return
    if _shares(recorded) != _shares(contents):
        yield f"the weights of {_names(contents)} are {_weights(contents)}, were {_weights(recorded)}"
    for old, new in zip(recorded, contents, strict=True):
        name = f"data.train.{new.name}" if new.name else "data.train.shards"
        if len(old.shards) != len(new.shards):
            yield f"{name} has {len(new.shards)} shards, had {len(old.shards)}"
            continue
        changed = [
            f"{shard.name} {', '.join(changes)}"
            for was, shard in zip(old.shards, new.shards, strict=True)
            if (changes := list(_shard_changes(was, shard)))
        ]
        if changed:
            more = f" and {len(changed) - _SHOWN} more shards" if len(changed) > _SHOWN else ""
            yield f"{name}: {'; '.join(changed[:_SHOWN])}{more}"


def _shard_changes(was: ShardContent, now: ShardContent) -> Iterator[str]:
    if was.samples != now.samples:
        yield f"has {now.samples} usable samples, had {was.samples}"
    if was.documents != now.documents:
        size = "the same size" if now.bytes == was.bytes else f"{now.bytes} bytes, had {was.bytes}"
        yield f"holds other .json members ({size})"
    if was.media != now.media:
        yield "holds other media"


def _names(contents: Sequence[SourceContent]) -> str:
    return f"{len(contents)} sources ({', '.join(content.name or 'data.train.shards' for content in contents)})"


def _weights(contents: Sequence[SourceContent]) -> str:
    return " : ".join(f"{content.weight:g}" for content in contents)


def _shares(contents: Sequence[SourceContent]) -> list[float]:
    total = sum(content.weight for content in contents)
    return [content.weight / total for content in contents]

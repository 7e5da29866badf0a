"""A whole conversion: converts parts in parallel, continues after an interruption, gives shards their final names.

A part always consists of the same rows, and its files depend only on them, so neither the number of processes nor an
interruption changes a byte. A part is done when its result is in `.partial`; shards get their names when all parts are
done. `report.json` is written last. Beside it, sizes and hashes of shards and media are kept, by which the same command
verifies a finished conversion.
"""

import json
import multiprocessing
import os
import shutil
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from mimo_gemma4.atomic import replace_file
from mimo_gemma4.data.convert import samples
from mimo_gemma4.data.convert.conversation import ConversationReader
from mimo_gemma4.data.convert.finished import changed_files, damaged_shards, load_state, locked, save_state
from mimo_gemma4.data.convert.report import Report, counted
from mimo_gemma4.data.convert.rows import Rows, cut_evenly
from mimo_gemma4.data.convert.samples import Part, PartResult
from mimo_gemma4.data.convert.stamps import ShardStamp, is_shard, stamp_of_shard
from mimo_gemma4.data.index import progress
from mimo_gemma4.errors import DataError

FORMAT_VERSION = 2
"""Raised when the same rows become other bytes; a conversion that an older version began is then not continued."""

_PARTIAL = ".partial"
_PLAN = "plan.json"
_REPORT = "report.json"


@dataclass(frozen=True)
class Conversion:
    """Sources, output folder and options of a conversion."""

    sources: Sequence[Rows]
    output: Path
    media_folder: Path
    """Folder of relative media paths; no path may lead out of it."""
    reader: ConversationReader = field(default_factory=ConversationReader)
    shard_samples: int = 1000
    """Rows per shard; a shard has fewer samples if rows are dropped or held out."""
    valid_fraction: float = 0.0
    """Fraction of the samples that go to `valid-*.tar`."""
    strict: bool = False
    """Raise `DataError` if rows say what nothing uses."""

    def run(self, workers: int = 1) -> Report:
        """Convert the rows that are not converted yet. Raises `DataError`, also if `output` has another conversion.

        A finished conversion is verified: shards that are missing or damaged are written again.
        """
        with locked(self.output):
            return self._run(workers)

    def _run(self, workers: int) -> Report:
        plan = self._plan()
        if (report := self._finished(plan)) is not None:
            self._check_strict(report.unused)
            return report
        self._begin(plan)
        parts = self._parts()
        left = [part for part in parts if not _is_done(part)]
        for part in progress(_convert(left, workers), len(left), "converting"):
            self._check_strict(self._without_ignored(_result(part).unused))
        results = [_result(part) for part in parts]
        lost = self._lost(parts, results)
        for _ in progress(_convert(lost, workers), len(lost), "converting again"):
            pass
        self._require_same(self._plan(), plan)  # the sources, meanwhile
        train, valid = self._name_train(parts, results), self._join_valid(parts, results)
        report = Report.of(plan, {"train": train, "valid": valid}, results)
        report = replace(report, unused=self._without_ignored(report.unused))
        self._check_strict(report.unused)
        save_state(self.output, results, [stamp_of_shard(self.output / name) for name in valid])
        replace_file(self.output / _REPORT, report.to_json())
        shutil.rmtree(self._partial)
        return report

    @property
    def is_finished(self) -> bool:
        """Whether `output` holds a finished conversion, which `run` verifies."""
        return (self.output / _REPORT).exists()

    @property
    def _partial(self) -> Path:
        return self.output / _PARTIAL

    def _plan(self) -> dict[str, Any]:
        """Everything that the output depends on."""
        return {
            "format": FORMAT_VERSION,
            "sources": [rows.version for rows in self.sources],
            "media": os.path.abspath(self.media_folder),
            "columns": dict(self.reader.columns),
            "prompt": self.reader.prompt,
            "ignored": self.reader.ignored_columns,
            "shard_samples": self.shard_samples,
            "valid_fraction": self.valid_fraction,
        }

    def _finished(self, plan: dict[str, Any]) -> Report | None:
        """The report of this conversion if it is complete and whole, else None; then the whole parts are kept.

        Raises `DataError` if media files are others than those converted.
        """
        path = self.output / _REPORT
        if not self.is_finished:
            return None
        report = Report.from_json(path.read_text(encoding="utf-8"))
        self._require_same(plan, report.plan)
        shutil.rmtree(self._partial, ignore_errors=True)
        results, valid = load_state(self.output) or ([], [])
        changed = list(dict.fromkeys(file for result in results for file in changed_files(result)))
        if changed:
            raise DataError(
                f"{len(changed)} media files changed after --out {self.output} was converted: {', '.join(changed[:3])}"
                f"{', …' if len(changed) > 3 else ''}; choose a new folder, or delete that one"
            )
        damaged = self._damaged_parts(report, results, valid) if results else frozenset()
        if results and not damaged:
            return replace(report, unused=self._without_ignored(report.unused))
        self._begin(plan, again=True)
        for part, result in zip(self._parts(), results, strict=False):
            if part.number not in damaged:
                replace_file(part.result, result.to_json())
        path.unlink()
        return None

    def _damaged_parts(
        self, report: Report, results: Sequence[PartResult], valid: Sequence[ShardStamp]
    ) -> frozenset[int]:
        """Numbers of the parts whose samples are in a shard that is missing or damaged."""
        train = [number for number, result in enumerate(results) if result.samples["train"]]
        stamps = [results[number].tars["train"] for number in train]
        damaged = [train[place] for place in damaged_shards(self.output, report.shards["train"], stamps)]
        groups = list(self._valid_groups(results).values())
        for place in damaged_shards(self.output, report.shards["valid"], valid):
            damaged += groups[place]
        return frozenset(damaged)

    def _begin(self, plan: dict[str, Any], *, again: bool = False) -> None:
        """Create the folder of parts, or check that an existing one belongs to this conversion.

        `again`: the shards in `output` are those of this conversion.
        """
        path = self._partial / _PLAN
        if path.exists():
            self._require_same(plan, json.loads(path.read_text(encoding="utf-8")))
            return
        if not again and any(self.output.glob("*.tar")):
            raise DataError(f"--out {self.output} already holds shards; choose a new folder")
        self._partial.mkdir(parents=True, exist_ok=True)
        replace_file(path, json.dumps(plan))

    def _require_same(self, plan: dict[str, Any], other: Any) -> None:
        different = [key for key in plan if other.get(key) != plan[key]]
        if different:
            key = different[0]
            raise DataError(
                f"--out {self.output} holds a conversion with other {key}: {other.get(key)!r:.300}, now "
                f"{plan[key]!r:.300}; choose a new folder, or delete that one"
            )

    def _parts(self) -> list[Part]:
        runs = cut_evenly(self.sources, self.shard_samples)
        return [
            Part(
                number=number,
                first_row=number * self.shard_samples,
                rows=rows,
                reader=self.reader,
                media_folder=self.media_folder,
                valid_fraction=self.valid_fraction,
                folder=self._partial,
            )
            for number, rows in enumerate(runs)
        ]

    def _name_train(self, parts: Sequence[Part], results: Sequence[PartResult]) -> list[str]:
        """Give the parts' tars their final names; some may have them from an interrupted run."""
        names: list[str] = []
        for part, result in zip(parts, results, strict=True):
            if result.samples["train"]:
                names.append(f"train-{len(names):06d}.tar")
                if part.tar("train").exists():
                    os.replace(part.tar("train"), self.output / names[-1])
        return names

    def _lost(self, parts: Sequence[Part], results: Sequence[PartResult]) -> list[Part]:
        """Parts that are done, but whose tars are gone both from the folder of parts and from `output`."""
        lost, count = [], 0
        for part, result in zip(parts, results, strict=True):
            if result.samples["train"]:
                name = self.output / f"train-{count:06d}.tar"
                count += 1
                stamp = result.tars["train"]
                if not any(is_shard(path, stamp, whole=False) for path in (part.tar("train"), name)):
                    lost.append(part)
        return lost

    def _valid_groups(self, results: Sequence[PartResult]) -> dict[int, list[int]]:
        """Numbers of the parts whose held-out samples make one shard of about `shard_samples` samples."""
        before = accumulate((result.samples["valid"] for result in results), initial=0)
        groups: dict[int, list[int]] = {}
        for number, (result, count) in enumerate(zip(results, before, strict=False)):
            if result.samples["valid"]:
                groups.setdefault(count // self.shard_samples, []).append(number)
        return groups

    def _join_valid(self, parts: Sequence[Part], results: Sequence[PartResult]) -> list[str]:
        """Join the held-out samples of all parts to shards. A shard whose parts have no tars is there already."""
        groups = list(self._valid_groups(results).values())
        names = [f"valid-{number:06d}.tar" for number in range(len(groups))]
        for name, numbers in zip(names, groups, strict=True):
            paths = [parts[number].tar("valid") for number in numbers]
            if (self.output / name).exists() and not all(path.exists() for path in paths):
                continue
            partial = self._partial / name
            with tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as joined:
                for path in paths:
                    with tarfile.open(path) as tar:
                        for member in tar:
                            joined.addfile(member, tar.extractfile(member))
            os.replace(partial, self.output / name)
        return names

    def _without_ignored(self, unused: Mapping[str, int]) -> dict[str, int]:
        return {name: count for name, count in unused.items() if name not in self.reader.ignored}

    def _check_strict(self, unused: Mapping[str, int]) -> None:
        """Raise `DataError` under `strict` if rows say what nothing uses."""
        if self.strict and unused:
            raise DataError(
                f"--strict: nothing uses {counted(unused)}; name the meaning of a column with --column MEANING=NAME, "
                "or leave it out with --ignore NAME"
            )


def _result(part: Part) -> PartResult:
    return PartResult.from_json(part.result.read_text(encoding="utf-8"))


def _is_done(part: Part) -> bool:
    """Whether a part is converted, from media files that are still the same."""
    return part.result.exists() and not changed_files(_result(part))


def _convert(parts: Sequence[Part], workers: int) -> Iterator[Part]:
    """Convert parts, in this process or several, and yield each when it is done."""
    if workers == 1 or len(parts) < 2:
        for part in parts:
            part.convert()
            yield part
        return
    # Workers are not forked from here, as Arrow has threads. The server imports the common modules once.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([samples.__name__, "transformers.utils.chat_template_utils"])
    with ProcessPoolExecutor(min(workers, len(parts)), context) as pool:
        futures = {pool.submit(part.convert): part for part in parts}
        try:
            for future in as_completed(futures):
                future.result()
                yield futures[future]
        except BrokenProcessPool as error:
            raise DataError(
                "a worker process was killed, perhaps out of memory; the same command continues from here, with "
                f"--workers below {workers} if memory is short"
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

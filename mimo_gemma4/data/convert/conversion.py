"""A whole conversion: converts parts in parallel, continues after an interruption, gives shards their final names.

A part always consists of the same rows, and its files depend only on them, so neither the number of processes nor an
interruption changes a byte. A part is done when its result is in `.partial`; shards get their names when all parts are
done. `report.json` is written last.
"""

import json
import multiprocessing
import os
import shutil
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

from mimo_gemma4.atomic import replace_file
from mimo_gemma4.data.convert import samples
from mimo_gemma4.data.convert.conversation import ConversationReader
from mimo_gemma4.data.convert.report import Report
from mimo_gemma4.data.convert.rows import Rows, cut_evenly
from mimo_gemma4.data.convert.samples import Part, PartResult
from mimo_gemma4.data.index import progress
from mimo_gemma4.errors import DataError

FORMAT_VERSION = 1
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

    def run(self, workers: int = 1) -> Report:
        """Convert the rows that are not converted yet. Raises `DataError`, also if `output` has another conversion."""
        plan = self._plan()
        if (report := self._finished(plan)) is not None:
            shutil.rmtree(self._partial, ignore_errors=True)
            return report
        self._begin(plan)
        parts = self._parts()
        left = [part for part in parts if not part.result.exists()]
        for _ in progress(_convert(left, workers), len(left), "converting"):
            pass
        results = [PartResult.from_json(part.result.read_text(encoding="utf-8")) for part in parts]
        shards = {"train": self._name_train(parts, results), "valid": self._join_valid(parts, results)}
        report = Report.of(plan, shards, results)
        replace_file(self.output / _REPORT, report.to_json())
        shutil.rmtree(self._partial)
        return report

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
            "shard_samples": self.shard_samples,
            "valid_fraction": self.valid_fraction,
        }

    def _finished(self, plan: dict[str, Any]) -> Report | None:
        """The report of this conversion if it is complete, else None."""
        path = self.output / _REPORT
        if not path.exists():
            return None
        report = Report.from_json(path.read_text(encoding="utf-8"))
        self._require_same(plan, report.plan)
        return report

    def _begin(self, plan: dict[str, Any]) -> None:
        """Create the folder of parts, or check that an existing one belongs to this conversion."""
        path = self._partial / _PLAN
        if path.exists():
            self._require_same(plan, json.loads(path.read_text(encoding="utf-8")))
            return
        if any(self.output.glob("*.tar")):
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

    def _join_valid(self, parts: Sequence[Part], results: Sequence[PartResult]) -> list[str]:
        """Join the held-out samples of all parts to shards of about `shard_samples` samples."""
        before = accumulate((result.samples["valid"] for result in results), initial=0)
        shards: dict[int, list[Path]] = {}
        for part, result, count in zip(parts, results, before, strict=False):
            if result.samples["valid"]:
                shards.setdefault(count // self.shard_samples, []).append(part.tar("valid"))
        names = [f"valid-{number:06d}.tar" for number in range(len(shards))]
        for name, paths in zip(names, shards.values(), strict=True):
            partial = self._partial / name
            with tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as joined:
                for path in paths:
                    with tarfile.open(path) as tar:
                        for member in tar:
                            joined.addfile(member, tar.extractfile(member))
            os.replace(partial, self.output / name)
        return names


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

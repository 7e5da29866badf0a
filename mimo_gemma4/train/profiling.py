"""Chrome traces of chosen training steps (`profile.steps`): what every rank did when, module by module.

A span is named `module.action[number]`, for example `vision.encode[3]`. The number is the microbatch for an action of
the schedule, the step for what happens once per step. Times are microseconds after the trace's `baseTimeNanoseconds`,
which counts from 1970 by the host's clock: traces of one host agree exactly, those of several as well as their clocks.
"""

import gzip
import json
import re
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from torch.profiler import ProfilerAction, ProfilerActivity, profile, record_function

from mimo_gemma4.atomic import replace_file
from mimo_gemma4.distributed.layout import Layout
from mimo_gemma4.distributed.platform import Platform

FOLDER = "profile"
"""Folder of the traces in `run.dir`."""
COMPRESSED_FROM = 32 * 2**20
"""Bytes from which a trace is compressed; viewers open both."""
TRAINER = "trainer"
"""In place of a module in spans that concern all modules."""

Span = Callable[[str, str, int], AbstractContextManager[None]]
"""From module, action and its number to a context whose time is recorded under these names."""
_UNRECORDED = nullcontext()


class SpanName(NamedTuple):
    """The parts of a span's name."""

    module: str
    action: str
    number: int
    """Microbatch, or step."""

    def __str__(self) -> str:
        """The name as it stands in the trace."""
        return f"{self.module}.{self.action}[{self.number}]"

    @property
    def is_step(self) -> bool:
        """Whether it is the span of a whole step."""
        return (self.module, self.action) == (TRAINER, "step")

    @classmethod
    def parse(cls, text: str) -> "SpanName | None":
        """Parse the name of a span; None for annotations of others."""
        found = re.fullmatch(r"(\S+)\.(\w+)\[(\d+)\]", text)
        return cls(found[1], found[2], int(found[3])) if found else None


def unrecorded(module: str, action: str, number: int) -> AbstractContextManager[None]:
    """The `Span` that records nothing."""
    return _UNRECORDED


class Tracer:
    """Traces the chosen steps of one rank, and costs nothing in the others.

    The step before them is traced and thrown away, because the profiler's setup on first use would distort it.
    """

    def __init__(self, steps: Collection[int], folder: Path, layout: Layout, platform: Platform):
        """Trace the steps with these numbers to `folder/rank-<r>.json`, or `.json.gz` where that is large."""
        self.steps, self.folder, self.layout, self.platform = frozenset(steps), folder, layout, platform
        self._profiler: profile | None = None
        self._trace: dict[str, Any] | None = None

    def span(self, module: str, action: str, number: int) -> AbstractContextManager[None]:
        """Record the time of a block where a step is being traced."""
        if self._profiler is None:
            return _UNRECORDED
        return record_function(str(SpanName(module, action, number)))

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Trace the block, step `number`, if it is chosen; the file is written once the next step is not."""
        if self._profiler is None and {number, number + 1} & self.steps:
            self._profiler = self._start(number)
        with self.span(TRAINER, "step", number):
            yield
        if self._profiler is None:
            return
        if number + 1 in self.steps:
            self._profiler.step()
        else:  # waits for the device, then calls `_save`
            self._profiler.stop()
            self._profiler = None

    def _start(self, first: int) -> profile:
        def schedule(steps_done: int) -> ProfilerAction:
            number = first + steps_done
            if number not in self.steps:
                return ProfilerAction.WARMUP
            return ProfilerAction.RECORD if number + 1 in self.steps else ProfilerAction.RECORD_AND_SAVE

        activities = [ProfilerActivity.CPU]
        if self.platform.device_type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        profiler = profile(activities=activities, schedule=schedule, on_trace_ready=self._save)
        profiler.start()
        return profiler

    def _save(self, profiler: profile) -> None:
        """Append the traced steps to those that this run has traced before, and write all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.folder) as scratch:
            path = Path(scratch) / "trace.json"
            profiler.export_chrome_trace(str(path))
            trace = json.loads(path.read_bytes())
        for event in trace["traceEvents"]:
            if event["ph"] == "M" and event["name"] == "process_name":  # else it is `python`
                event["args"]["name"] = self._label()
        if self._trace is None:
            self._trace = trace | {"traceEvents": [], "mimo": self._place()}
        self._trace["traceEvents"] += trace["traceEvents"]  # a process counts time from one origin
        write_trace(self._trace, self.folder, self.platform.rank)

    def _place(self) -> dict[str, Any]:
        """The rank's number and coordinates by module, and both in words."""
        rank, grids = self.platform.rank, self.layout.grids
        modules = {name: grids[name].coordinate(rank)._asdict() for name in self.layout.modules_of(rank)}
        return {"rank": rank, "label": self._label(), "modules": modules}

    def _label(self) -> str:
        """`rank 3: language tp1 pp0`; axes of size one are left out."""
        rank, modules = self.platform.rank, []
        for name in self.layout.modules_of(rank):
            grid = self.layout.grids[name]
            place = grid.coordinate(rank)._asdict().items()
            modules.append(" ".join([name, *(f"{axis}{at}" for axis, at in place if getattr(grid, axis) > 1)]))
        return f"rank {rank}: {', '.join(modules)}"


def write_trace(trace: dict[str, Any], folder: Path, rank: int) -> None:
    """Write a rank's trace in place of an older one, compressed where it is large."""
    content = json.dumps(trace).encode()
    path = folder / f"rank-{rank}.json"
    other = path.with_name(f"{path.name}.gz")
    if len(content) >= COMPRESSED_FROM:
        path, other, content = other, path, gzip.compress(content, compresslevel=4)
    replace_file(path, content)
    other.unlink(missing_ok=True)

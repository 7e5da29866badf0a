"""Chrome traces of chosen training steps (`profile.steps`): what every rank did when, module by module.

A span is written `module.action[number]`, for example `vision.encode[3]`: the microbatch for an action of the schedule,
the step for what happens once a step. Times are microseconds after the trace's `baseTimeNanoseconds`, which counts from
1970 by the clock of the host: traces of ranks agree as well as the clocks of their hosts do, on one host exactly.
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
"""Where in `run.dir` the traces are."""
COMPRESSED_FROM = 32 * 2**20
"""Bytes from which a trace is compressed; viewers open both."""
TRAINER = "trainer"
"""Stands for the module in spans of what concerns all modules."""

Span = Callable[[str, str, int], AbstractContextManager[None]]
"""From module, action and its number to a context whose time is recorded under these names."""
_UNRECORDED = nullcontext()


class SpanName(NamedTuple):
    """What a span tells about itself."""

    module: str
    action: str
    number: int
    """Microbatch, or step."""

    def __str__(self) -> str:
        """Its name in the trace."""
        return f"{self.module}.{self.action}[{self.number}]"

    @property
    def is_step(self) -> bool:
        """Whether it is the span of a whole step."""
        return (self.module, self.action) == (TRAINER, "step")

    @classmethod
    def parse(cls, text: str) -> "SpanName | None":
        """The name of a span of this project; None for other annotations."""
        found = re.fullmatch(r"(\S+)\.(\w+)\[(\d+)\]", text)
        return cls(found[1], found[2], int(found[3])) if found else None


def unrecorded(module: str, action: str, number: int) -> AbstractContextManager[None]:
    """The `Span` that records nothing."""
    return _UNRECORDED


class Tracer:
    """Traces the chosen steps of one rank, and costs nothing in the others.

    One step before those is observed and thrown away: what the profiler sets up on first use is no part of the picture.
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
        """Trace the block, step `number`, if it is chosen; the file is written when the next one is not."""
        if self._profiler is None and {number, number + 1} & self.steps:
            self._profiler = self._start(number)
        with self.span(TRAINER, "step", number):
            yield
        if self._profiler is None:
            return
        if number + 1 in self.steps:
            self._profiler.step()
        else:  # the profiler waits for the device, then hands over what it has seen
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
        """Write what was traced, behind what this run has traced before."""
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
        """What the trace says about its rank: number, coordinates by module, and both in words."""
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

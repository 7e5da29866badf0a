"""One picture and one table of a traced training step: which rank did what when, and how much of it was waiting.

Run with:  python -m mimo_gemma4.timeline RUN_DIR [--step N] [--out timeline.png]

It reads the traces that every rank wrote for `profile.steps` (docs/profile.md). In a trace with GPU kernels an action
lasts from the begin of the first kernel that it launched to the end of the last one, and waits are kernels, too: the
host's time does not count. Without kernels an action lasts as long as the host worked on it.
"""

import argparse
import gzip
import json
import sys
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mimo_gemma4.errors import ConfigError, DataError, MimoError, optional_import
from mimo_gemma4.train.profiling import FOLDER, SpanName

WAITS = ("send", "recv", "post", "load", "reduce")
"""First words of the actions that transfer or wait; all others compute."""
COMPUTES = {
    "encode": "encode",
    "backward": "backward",
    "encoder_backward": "backward",
    "optimizer_step": "optimizer",
}
"""Kind of the actions that compute but are not a forward pass."""
SHADES = {"encode": 0.0, "forward": 0.0, "backward": 0.35, "optimizer": 0.65}
"""How much darker than the module's colour a kind is drawn."""
KINDS = tuple(SHADES)
WAIT_COLOUR = "#b8b8b8"
WIDTH_OF_A_DIGIT = 0.006
"""As a share of the axes."""
CENTRED: dict[str, Any] = {"ha": "center", "va": "center"}
LAUNCHES = ("cuda_runtime", "cuda_driver")
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")

Interval = tuple[float, float]
"""Begin and end in seconds since 1970."""


@dataclass(frozen=True)
class Bar:
    """One action of one rank in the traced step."""

    name: SpanName
    begin: float
    """Seconds since 1970."""
    end: float

    @property
    def kind(self) -> str:
        """One of `KINDS`, or `wait`."""
        action = self.name.action
        return "wait" if action.partition("_")[0] in WAITS else COMPUTES.get(action, "forward")


@dataclass(frozen=True)
class RankStep:
    """One rank's part of one step."""

    rank: int
    label: str
    begin: float
    """Seconds since 1970."""
    end: float
    bars: list[Bar]

    def shares(self) -> dict[str, float]:
        """Shares of the step: computing by kind and in sum (`busy`), the rest (`wait`), hidden transfers (`hidden`)."""
        spans = {
            kind: _union((bar.begin, bar.end) for bar in self.bars if bar.kind == kind) for kind in (*KINDS, "wait")
        }
        moving = _length(spans.pop("wait"))
        busy = _length(_union(interval for intervals in spans.values() for interval in intervals))
        either = _length(_union((bar.begin, bar.end) for bar in self.bars))
        seconds = {kind: _length(intervals) for kind, intervals in spans.items()}
        step = self.end - self.begin
        seconds |= {"busy": busy, "wait": step - busy, "hidden": busy + moving - either}
        return {name: part / step for name, part in seconds.items()}


def main(arguments: list[str] | None = None) -> int:
    """Print the table, then draw the picture; the exit code is 1 where one of them cannot be made."""
    options = command_parser().parse_args(arguments)
    try:
        traces = read_traces(options.run_dir / FOLDER)
        step, ranks = select_step(traces, options.step)
        print(table(step, ranks))
        out = options.out or options.run_dir / FOLDER / f"timeline-{step}.png"
        draw(step, ranks, out)
    except MimoError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    print(out)
    return 0


def command_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m mimo_gemma4.timeline", description="Draw a traced training step: a row for every rank."
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="folder of a run that had `profile.steps`")
    parser.add_argument("--step", type=int, metavar="N", help="which of the traced steps; default: the last")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help=f"picture to write; default RUN_DIR/{FOLDER}/timeline-N.png"
    )
    return parser


def read_traces(folder: Path) -> list[dict[str, Any]]:
    """The traces of all ranks, by rank. Raises `DataError` where there are none or one cannot be read."""
    paths = sorted([*folder.glob("rank-*.json"), *folder.glob("rank-*.json.gz")])
    if not paths:
        raise DataError(f"{folder} holds no traces: train with profile.steps=[…] and name the folder of that run")
    traces = []
    for path in paths:
        try:
            content = path.read_bytes()
            trace = json.loads(gzip.decompress(content) if path.suffix == ".gz" else content)
            if {"traceEvents", "baseTimeNanoseconds", "mimo"} - trace.keys():
                raise ValueError("it was not written by this project")
        except (OSError, EOFError, ValueError) as error:
            raise DataError(f"{path} is not a trace: {error}") from error
        traces.append(trace)
    return sorted(traces, key=lambda trace: trace["mimo"]["rank"])


def select_step(traces: Sequence[dict[str, Any]], wanted: int | None = None) -> tuple[int, list[RankStep]]:
    """Number and parts of the `wanted` step, or of the last one that all ranks traced. Raises `ConfigError`."""
    steps = [rank_steps(trace) for trace in traces]
    common = sorted(set.intersection(*(set(of_rank) for of_rank in steps)))
    if not common or (wanted is not None and wanted not in common):
        known = ", ".join(map(str, common)) or "none"
        asked = "" if wanted is None else f"--step {wanted}: "
        raise ConfigError(f"{asked}the steps that all of the {len(traces)} ranks have traced are: {known}")
    step = common[-1] if wanted is None else wanted
    return step, [of_rank[step] for of_rank in steps]


def rank_steps(trace: dict[str, Any]) -> dict[int, RankStep]:
    """What a rank did, by step."""
    origin, place = trace["baseTimeNanoseconds"] / 1e9, trace["mimo"]
    spans = [
        (name, _interval(event))
        for event in trace["traceEvents"]
        if event.get("cat") == "user_annotation" and (name := SpanName.parse(event["name"]))
    ]
    kernels = _kernels(trace["traceEvents"])
    steps, bars = {}, []
    for name, on_host in spans:
        interval = _extent(kernels, on_host) if kernels else on_host
        if interval is None:  # it gave the device nothing to do
            continue
        begin, end = (origin + seconds for seconds in interval)
        if name.is_step:
            steps[name.number] = (on_host, RankStep(place["rank"], place["label"], begin, end, []))
        else:
            bars.append((on_host, Bar(name, begin, end)))
    for (first, last), step in steps.values():
        step.bars.extend(bar for (begin, end), bar in bars if first <= begin and end <= last)
    return {number: step for number, (_, step) in steps.items()}


def _kernels(events: Iterable[dict[str, Any]]) -> list[tuple[float, Interval]]:
    """When the host launched and the device ran each kernel and copy, in the order of launching.

    Annotations on the device (`gpu_user_annotation`) would miss the backward pass: they only cover kernels that their
    own thread launched, and autograd runs in another.
    """
    launches, ran = {}, []
    for event in events:
        correlation = event.get("args", {}).get("correlation")
        if correlation is None:
            continue
        if event["cat"] in LAUNCHES:
            launches[correlation] = _interval(event)[0]
        elif event["cat"] in ON_DEVICE:
            ran.append((correlation, _interval(event)))
    return sorted((launches[launch], interval) for launch, interval in ran if launch in launches)


def _extent(kernels: Sequence[tuple[float, Interval]], on_host: Interval) -> Interval | None:
    """From the begin of the first to the end of the last kernel that was launched in an interval of the host's time."""
    first, last = (bisect_right(kernels, moment, key=lambda kernel: kernel[0]) for moment in on_host)
    ran = [interval for _, interval in kernels[first:last]]
    return (min(begin for begin, _ in ran), max(end for _, end in ran)) if ran else None


def _interval(event: dict[str, Any]) -> Interval:
    return event["ts"] / 1e6, (event["ts"] + event["dur"]) / 1e6


def _union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same times without overlaps, ascending."""
    joined: list[Interval] = []
    for begin, end in sorted(intervals):
        if joined and begin <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((begin, end))
    return joined


def _length(intervals: Iterable[Interval]) -> float:
    return sum(end - begin for begin, end in intervals)


def table(step: int, ranks: Sequence[RankStep]) -> str:
    """Shares of the step by rank (`RankStep.shares`), as lines for a terminal.

    `busy` is the sum of the kinds after it, `wait` is all else; `hidden` are transfers while the rank computed.
    """
    seconds = max(part.end for part in ranks) - min(part.begin for part in ranks)
    columns = ("busy", *KINDS, "wait", "hidden")
    width = max(len(part.label) for part in ranks)
    lines = [f"step {step}: {seconds * 1e3:,.1f} ms", " ".join([" " * width, *(f"{name:>9}" for name in columns)])]
    for part in ranks:
        shares = part.shares()
        lines.append(" ".join([part.label.ljust(width), *(f"{shares[name]:9.1%}" for name in columns)]))
    return "\n".join(lines)


def draw(step: int, ranks: Sequence[RankStep], path: Path) -> None:
    """A row for every rank: computing above, with the microbatch's number, transfers and waits below.

    Raises `MissingPackageError`.
    """
    with optional_import("matplotlib", extra="plots", purpose="drawing the timeline"):
        from matplotlib.colors import to_rgb
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch

    modules = list(dict.fromkeys(bar.name.module for part in ranks for bar in part.bars if bar.kind != "wait"))
    colours = {
        (name, kind): _darker(to_rgb(f"C{number % 10}"), shade)
        for number, name in enumerate(modules)
        for kind, shade in SHADES.items()
    }
    origin = min(part.begin for part in ranks)
    length = max(part.end for part in ranks) - origin
    figure = Figure(figsize=(14, 1.2 + 0.45 * len(ranks)), layout="constrained")
    axes = figure.add_subplot(xlabel="milliseconds", title=f"step {step}")
    drawn = set()
    for row, part in enumerate(ranks):
        for bar in part.bars:
            waits = bar.kind == "wait"
            left, width = 1e3 * (bar.begin - origin), 1e3 * (bar.end - bar.begin)
            colour = to_rgb(WAIT_COLOUR) if waits else colours[bar.name.module, bar.kind]
            bottom, height = (row + 0.2, 0.22) if waits else (row - 0.42, 0.62)
            axes.broken_barh([(left, width)], (bottom, height), facecolors=[colour], edgecolor="white", linewidth=0.3)
            drawn.add((bar.name.module, bar.kind))
            text = str(bar.name.number)
            if bar.kind not in ("wait", "optimizer") and width > 1e3 * length * WIDTH_OF_A_DIGIT * len(text):
                axes.annotate(text, (left + width / 2, bottom + height / 2), color="white", fontsize=7, **CENTRED)
    axes.set_xlim(0, 1e3 * length)
    axes.set_ylim(len(ranks) - 0.5, -0.5)
    axes.set_yticks(range(len(ranks)), [part.label for part in ranks])
    shown = [(name, kind) for name in modules for kind in SHADES if (name, kind) in drawn]
    legend = [Patch(facecolor=colours[pair], label=" ".join(pair)) for pair in shown]
    legend.append(Patch(facecolor=WAIT_COLOUR, label="transfer, wait"))
    figure.legend(handles=legend, loc="outside lower center", ncols=min(len(legend), 8), frameon=False, fontsize=8)
    figure.savefig(path, dpi=100)


def _darker(colour: tuple[float, float, float], shade: float) -> tuple[float, float, float]:
    red, green, blue = colour
    return red * (1 - shade), green * (1 - shade), blue * (1 - shade)


if __name__ == "__main__":
    sys.exit(main())

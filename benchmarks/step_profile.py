"""Where the time of a training step goes, by kind of kernel, and the picture of `step.py`'s results."""

import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

KINDS = {
    "communication": r"nccl",
    "attention": r"flex|triton_tem|fmha|flash|ffpa|attention|attn|sdpa",
    "optimizer": r"adam|multi_tensor|lpnorm",
    "element-wise and norm": r"^triton_(poi|red|per)|norm",
    "GEMM": r"gemm|nvjet|cutlass|cublas|xmma|splitk|gemv|wgmma|^aten::(mm|addmm|bmm)$",
    "copies": r"memcpy|memset|copy|fill|catarray",
}
"""What a kernel's name contains, in the order in which kinds are tried; others are element-wise."""
ELEMENTWISE, COMMUNICATION, IDLE = "element-wise and norm", "communication", "idle"
SHARES = ("GEMM", "attention", ELEMENTWISE, "optimizer", "copies", COMMUNICATION, IDLE)
"""In the order in which a moment counts where several kernels run: communication is what nothing else hides."""
UNALIGNED = re.compile(r"align[12](?!\d)|s1688|cutlass_75")
"""Names of GEMMs whose operands are not aligned to 16 bytes, which take a multiple of the time."""
STEPS = 2
"""Steps that are recorded."""
NAMED = 25
"""Kernel names that are listed."""
Intervals = list[tuple[float, float]]


@dataclass(frozen=True)
class Kernel:
    """One kernel, or a copy, on the device."""

    name: str
    begin: float
    """Microseconds."""
    end: float

    @property
    def kind(self) -> str:
        """A key of `KINDS`."""
        name = self.name.lower()
        return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name)), ELEMENTWISE)


def record(step: Callable[[], object], device: torch.device) -> list[Kernel]:
    """Kernels of `STEPS` steps; on a CPU, torch's operations."""
    activity, categories = torch.profiler.ProfilerActivity.CPU, {"cpu_op"}
    if device.type == "cuda":
        activity, categories = torch.profiler.ProfilerActivity.CUDA, {"kernel", "gpu_memcpy", "gpu_memset"}
    with torch.profiler.profile(activities=[activity]) as profile:
        for _ in range(STEPS):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    return [
        Kernel(event["name"], event["ts"], event["ts"] + event["dur"])
        for event in events
        if event.get("cat") in categories
    ]


def summary(kernels: Sequence[Kernel]) -> dict[str, Any]:
    """Per step: milliseconds, shares of the time by kind, unaligned GEMMs, and the most expensive kernel names."""
    begin, end = min(kernel.begin for kernel in kernels), max(kernel.end for kernel in kernels)
    by_name: dict[str, list[float]] = defaultdict(list)
    for kernel in kernels:
        by_name[kernel.name].append(kernel.end - kernel.begin)
    rows = [
        {"name": name, "ms": sum(times) / 1e3 / STEPS, "count": len(times) / STEPS} for name, times in by_name.items()
    ]
    rows.sort(key=lambda row: -row["ms"])  # type: ignore[operator]
    return {
        "ms": (end - begin) / 1e3 / STEPS,
        "shares": shares(kernels),
        "unaligned": [row for row in rows if UNALIGNED.search(str(row["name"]))],
        "kernels": rows[:NAMED],
    }


def shares(kernels: Sequence[Kernel]) -> dict[str, float]:
    """Share of the time from the first kernel to the last by kind; they sum to 1."""
    begin, end = min(kernel.begin for kernel in kernels), max(kernel.end for kernel in kernels)
    intervals: dict[str, Intervals] = defaultdict(list)
    for kernel in kernels:
        intervals[kernel.kind].append((kernel.begin, kernel.end))
    found: dict[str, float] = {}
    covered: Intervals = []
    busy = 0.0
    for kind in SHARES[:-1]:
        covered = _union([*covered, *intervals[kind]])
        total = sum(last - first for first, last in covered)
        found[kind], busy = (total - busy) / (end - begin), total
    return found | {IDLE: 1.0 - busy / (end - begin)}


def _union(intervals: Iterable[tuple[float, float]]) -> Intervals:
    """The same moments as intervals that do not overlap, ascending."""
    merged: Intervals = []
    for begin, end in sorted(intervals):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return merged


def print_summary(title: str, found: dict[str, Any]) -> None:
    """Unaligned GEMMs first, then shares, then the most expensive kernels."""
    print(f"--- {title}: {found['ms']:.1f} ms a step")
    for row in found["unaligned"]:
        print(f"WARNING unaligned GEMM: {row['ms']:8.2f} ms {row['count']:6.0f}x {row['name'][:120]}")
    print("  ".join(f"{kind} {100 * share:.1f}%" for kind, share in found["shares"].items()))
    for row in found["kernels"]:
        print(f"{row['ms']:8.2f} ms {row['count']:6.0f}x {row['name'][:130]}")


def plot(results: Sequence[dict[str, Any]], out: Path) -> None:
    """Write the picture of some results of `step.py`: speed by case and system, and shares of our steps by kernel."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = {_title(case, result["gpus"]): case for result in results for case in result["cases"]}
    profiled = {name: case["profile"]["ours"]["shares"] for name, case in cases.items() if "ours" in case["profile"]}
    figure, axes = plt.subplots(1, 1 + bool(profiled), figsize=(7 * (1 + bool(profiled)), 4.5), squeeze=False)
    _plot_speed(axes[0, 0], cases)
    axes[0, 0].set_title("Whole training steps: " + ", ".join(dict.fromkeys(result["device"] for result in results)))
    if profiled:
        _plot_shares(axes[0, 1], profiled)
    figure.tight_layout()
    figure.savefig(out, dpi=150)
    plt.close(figure)


def _title(case: dict[str, Any], gpus: int) -> str:
    """The case's name, and its layout where it ran on several GPUs."""
    return case["case"] if gpus == 1 else f"{case['case']}\n{gpus} GPUs {case['layout']}".strip()


def _plot_speed(axes: Any, cases: dict[str, dict[str, Any]]) -> None:
    systems = list(dict.fromkeys(name for case in cases.values() for name in case["systems"]))
    width = 0.8 / len(systems)
    for number, system in enumerate(systems):
        found = {place: case["systems"].get(system) for place, case in enumerate(cases.values())}
        values = {place: it["tokens_per_second"] / it["gpus"] for place, it in found.items() if it is not None}
        places = [place + (number - (len(systems) - 1) / 2) * width for place in values]
        bars = axes.bar(places, list(values.values()), width, label=system)
        axes.bar_label(bars, fmt="{:,.0f}", fontsize=7, rotation=90, padding=2)
    axes.margins(y=0.2)
    axes.set_ylabel("tokens/s per GPU")
    axes.set_xticks(range(len(cases)), list(cases), rotation=20, ha="right", fontsize=8)
    axes.legend(fontsize=8)


def _plot_shares(axes: Any, profiled: dict[str, dict[str, float]]) -> None:
    below = [0.0] * len(profiled)
    for kind in SHARES:
        values = [100 * found[kind] for found in profiled.values()]
        color = "lightgrey" if kind == IDLE else None
        axes.bar(range(len(profiled)), values, 0.6, bottom=below, label=kind, color=color)
        below = [low + value for low, value in zip(below, values, strict=True)]
    axes.set_ylabel("% of the step")
    axes.set_title("Our step by kind of kernel (communication: what nothing hides)", fontsize=10)
    axes.set_xticks(range(len(profiled)), list(profiled), rotation=20, ha="right", fontsize=8)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))

"""Speed of whole training steps, ours against Hugging Face transformers, on the same model, weights and documents.

    python3 benchmarks/step.py --list
    python3 benchmarks/step.py --case text --case packed [--steps 5] [--rounds A-B-A-B-C] [--json OUT] [--profile]
    torchrun --nproc-per-node 2 benchmarks/step.py --case text --layout "language.tp=2 language.sequence_parallel=true"
    python3 benchmarks/step.py --plot RESULT.json … --out docs/step.png

Rounds: A is ours, `Trainer.train_step` on real shards, fp32 main weights; B is transformers with every layer compiled,
C without (`step_peer.py`). Under torchrun, B is ours on one GPU instead, and each data-parallel lane gets as many
documents as one GPU does. A round builds its model, checks the first step's loss against the others', times `--steps`
steps after the warm-up, and frees everything. Ratios are those of a round to the round of ours before it.

MFU counts useful operations (`mimo_gemma4.flops`): no recomputation, no padding, no weight gradients of frozen weights.
Cases `tiny-…` run on a CPU in seconds; their times mean nothing, and nothing is compiled there.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from step_models import CASES, Case, Workload
from step_peer import Peer, Setting, settings
from step_profile import plot, print_summary, record, summary

from mimo_gemma4.data.loader import StepLoader
from mimo_gemma4.distributed.platform import Platform, create_platform, destroy_distributed
from mimo_gemma4.errors import NumericsError
from mimo_gemma4.flops import peak_flops
from mimo_gemma4.optim.module_optimizer import ModuleOptimizer
from mimo_gemma4.train.build import build_loader, build_modules
from mimo_gemma4.train.trainer import Trainer
from mimo_gemma4.train.usage import now, seconds_between
from mimo_gemma4.weights.bindings import load

SYSTEMS = {"A": "ours", "B": "HF compiled", "C": "HF plain"}
ONE_GPU = "ours, one GPU"
WARM_UP = 3
"""Steps before the timed ones."""
LOSS_TOLERANCE = {"fp32": 1e-5, "bf16": 1e-3}
"""Largest relative difference of the first step's losses. bf16 keeps 8 bits (4e-3) of every logit; over a thousand
tokens most of their errors cancel: 1.4e-4 was seen with the tiny model, 5e-7 in fp32."""
LEFT_OVER = 2.0
"""GiB that may stay allocated between rounds without a warning."""
TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


class System(Protocol):
    """What a round measures."""

    def step(self) -> torch.Tensor:
        """One optimizer step; the mean loss of its tokens, on the device."""
        ...

    def close(self) -> None:
        """Stop what runs in the background."""
        ...


class Ours:
    """A run of this project, as `mimo_gemma4.train.build` makes it, but for the weights."""

    def __init__(self, workload: Workload) -> None:
        """Build the modules, optimizers, loader and trainer. Collective over all ranks."""
        setup = workload.setup
        model = build_modules(setup)
        for module in model.modules.values():
            load(module.bindings(), workload.weights, "drawn weights")
        optimizers = {
            name: ModuleOptimizer(module, setup.groups.modules[name], setup.config.module_optim(name))
            for name, module in model.modules.items()
        }
        loader: StepLoader = build_loader(setup, workload.dataset, train=True)
        self.trainer = Trainer(setup.config, model, optimizers, loader, None)

    def step(self) -> torch.Tensor:
        """`Trainer.train_step`."""
        return self.trainer.train_step().loss

    def close(self) -> None:
        """Stop reading ahead."""
        self.trainer.close()


@dataclass(frozen=True)
class Round:
    """What one round measured."""

    system: str
    setting: str
    seconds: list[float]
    """Of every timed step."""
    losses: list[float]
    """Of the first step and of the timed ones."""
    peak_gib: float | None
    """Largest allocated device memory of the timed steps; None on a CPU."""
    tokens: int
    """Tokens of a step."""
    gpus: int

    @property
    def title(self) -> str:
        """The system and its setting."""
        return f"{self.system}, {self.setting}" if self.setting else self.system

    @property
    def speed(self) -> float:
        """Tokens per second and GPU."""
        return self.tokens / statistics.median(self.seconds) / self.gpus


class Benchmark:
    """The rounds of one case."""

    def __init__(self, workload: Workload, options: argparse.Namespace) -> None:
        """Measure nothing yet."""
        self.workload, self.options = workload, options
        self.device, self.world = workload.platform.device, dist.get_world_size()
        self.tolerance = LOSS_TOLERANCE[workload.case.precision]
        self.rounds: list[Round] = []
        self.ratios: dict[str, list[float]] = {}
        """By system, ours over it, per GPU."""
        self.profiles: dict[str, dict[str, Any]] = {}
        self._settings: dict[str, Setting | None] = {}

    def run(self) -> None:
        """All rounds, in their order. Collective over all ranks."""
        ours: Round | None = None
        for letter in self.options.rounds.split("-"):
            found = self._round(letter)
            if found is None:
                self._print(f"{SYSTEMS[letter]}: out of memory")
                continue
            self.rounds.append(found)
            ratio = ""
            if letter == "A":
                ours = found
            elif ours is not None:
                self.ratios.setdefault(found.system, []).append(ours.speed / found.speed)
                ratio = f", ours has {ours.speed / found.speed:.2f} times that"
            self._print(f"{found.title}: {found.speed:,.0f} tokens/s/GPU{ratio}")

    def _round(self, letter: str) -> Round | None:
        """One round; None where the memory does not suffice."""
        if self.world > 1 and letter != "A":
            return self._one_gpu()
        if letter == "A":
            return attempt(partial(self._measure, "ours", "", partial(Ours, self.workload)), self.device)
        compiled, name = letter == "B", SYSTEMS[letter]
        if letter not in self._settings:
            self._settings[letter] = self._best_setting(compiled)
        setting = self._settings[letter]
        if setting is None:
            return None
        build = partial(Peer, self.workload, setting, compiled)
        return attempt(partial(self._measure, name, str(setting), build), self.device)

    def _measure(self, name: str, setting: str, build: Callable[[], System]) -> Round:
        """Check the loss, then time steps, then record some where that is asked for and not done yet."""
        system, options = build(), self.options
        try:
            losses = [system.step()]
            check_loss(name, float(losses[0]), self.rounds, self.tolerance)
            for _ in range(WARM_UP - 1):
                system.step()
            synchronize(self.device)
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self.device)
            moments = [now(self.device)]
            for _ in range(options.steps):
                losses.append(system.step())
                moments.append(now(self.device))
            synchronize(self.device)
            seconds = [seconds_between(*pair) for pair in zip(moments, moments[1:], strict=False)]
            gib = torch.cuda.max_memory_allocated(self.device) / 2**30 if self.device.type == "cuda" else None
            if options.profile and name not in self.profiles:
                self._profile(name, system)
        finally:
            system.close()
        return Round(name, setting, seconds, [float(x) for x in losses], gib, self.workload.tokens, self.world)

    def _profile(self, name: str, system: System) -> None:
        """Record some steps and keep the summary of this rank's kernels."""
        kernels = record(system.step, self.device)
        if not kernels:
            self._print("WARNING: the profiler has recorded no kernels")
            return
        self.profiles[name] = summary(kernels)
        if dist.get_rank() == 0:
            print_summary(f"{self.workload.case.name}, {name}", self.profiles[name])

    def _best_setting(self, compiled: bool) -> Setting | None:
        """The peer's fastest microbatch; None where none fits. Smaller ones are tried as long as that gains speed."""
        for choices in settings(self.workload.case):
            best, fastest = None, float("inf")
            for setting in choices:
                seconds = attempt(partial(self._trial, setting, compiled), self.device)
                speed = "out of memory" if seconds is None else f"{self.workload.tokens / seconds:,.0f} tokens/s"
                self._print(f"trial, HF {'compiled' if compiled else 'plain'}, {setting}: {speed}")
                if seconds is not None and seconds > fastest:
                    break
                if seconds is not None:
                    best, fastest = setting, seconds
            if best is not None:
                return best
        return None

    def _trial(self, setting: Setting, compiled: bool) -> float:
        """Seconds of the faster of the peer's third and fourth step."""
        peer = Peer(self.workload, setting, compiled)
        moments = []
        for _ in range(4):
            peer.step()
            moments.append(now(self.device))
        synchronize(self.device)
        return min(seconds_between(*moments[1:3]), seconds_between(*moments[2:]))

    def _one_gpu(self) -> Round | None:
        """A round of ours on one GPU, by a process that rank 0 starts while all ranks wait."""
        rounds: list[Any] = [None]
        if dist.get_rank() == 0:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "result.json"
                steps = ["--steps", str(self.options.steps), "--rounds", "A", "--json", str(path)]
                environment = {key: value for key, value in os.environ.items() if key not in TORCHRUN}
                command = [sys.executable, __file__, "--case", self.workload.case.name, *steps]
                subprocess.run(command, env=environment, stdout=subprocess.DEVNULL)
                if path.is_file():
                    rounds = json.loads(path.read_text())["cases"][0]["rounds"] or rounds
        dist.broadcast_object_list(rounds, src=0, group=self.workload.setup.groups.host)
        if rounds[0] is None:
            return None
        found = Round(**rounds[0] | {"system": ONE_GPU})
        check_loss(ONE_GPU, found.losses[0], self.rounds, self.tolerance)
        return found

    def _print(self, text: str) -> None:
        if dist.get_rank() == 0:
            print(f"[{self.workload.case.name}] {text}", flush=True)

    def result(self, peak: float | None) -> dict[str, Any]:
        """Everything that was measured, for JSON. `peak`: operations per second of a GPU, None where unknown."""
        systems = {}
        for name in dict.fromkeys(entry.system for entry in self.rounds):
            rounds = [entry for entry in self.rounds if entry.system == name]
            speed = statistics.median(entry.speed for entry in rounds)
            flops = speed * self.workload.flops / self.workload.tokens
            ratios = self.ratios.get(name)
            systems[name] = {
                "setting": rounds[0].setting,
                "gpus": rounds[0].gpus,
                "tokens_per_second": speed * rounds[0].gpus,
                "step_ms": 1e3 * statistics.median(statistics.median(entry.seconds) for entry in rounds),
                "tflops_per_gpu": flops / 1e12,
                "mfu": flops / peak if peak else None,
                "peak_gib": max(entry.peak_gib for entry in rounds) if rounds[0].peak_gib is not None else None,
                "ours_over_it": [statistics.median(ratios), min(ratios), max(ratios)] if ratios else None,
            }
        return {
            "case": self.workload.case.name,
            "about": self.workload.case.about,
            "layout": self.options.layout,
            "tokens": self.workload.tokens,
            "flops": self.workload.flops,
            "loss_tolerance": self.tolerance,
            "systems": systems,
            "rounds": [asdict(entry) for entry in self.rounds],
            "profile": self.profiles,
        }


def check_loss(name: str, loss: float, others: Sequence[Round], tolerance: float) -> None:
    """Raise `NumericsError` where a system's first loss is not that of the `others`, or not a number."""
    for other in others:
        difference = abs(loss - other.losses[0]) / abs(other.losses[0])
        if not difference <= tolerance:
            raise NumericsError(
                f"the first loss of {name} is {loss:.6f}, that of {other.system} {other.losses[0]:.6f}: their relative "
                f"difference {difference:.1e} is above {tolerance:.0e}"
            )


def attempt[Found](function: Callable[[], Found], device: torch.device) -> Found | None:
    """What `function` returns, or None where it runs out of device memory; all that it made is freed."""
    found = None
    try:
        found = function()
    except torch.OutOfMemoryError:
        pass
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        left = torch.cuda.memory_allocated(device) / 2**30
        if left > LEFT_OVER:
            print(f"WARNING: {left:.1f} GiB are still allocated after a round", flush=True)
    return found


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def table(results: list[dict[str, Any]]) -> list[str]:
    """The lines of the table."""
    head = ["case", "system", "GPUs", "tokens/s", "step ms", "TF/s/GPU", "MFU %", "GiB", "ours / it (min..max)"]
    rows = [head]
    for case in results:
        for name, found in case["systems"].items():
            title = f"{name}, {found['setting']}" if found["setting"] else name
            mfu = "-" if found["mfu"] is None else f"{100 * found['mfu']:.1f}"
            gib = "-" if found["peak_gib"] is None else f"{found['peak_gib']:.1f}"
            ratio = "{:.2f} ({:.2f}..{:.2f})".format(*found["ours_over_it"]) if found["ours_over_it"] else ""
            speed = [f"{found['tokens_per_second']:,.0f}", f"{found['step_ms']:.1f}", f"{found['tflops_per_gpu']:.1f}"]
            rows.append([case["case"], title, str(found["gpus"]), *speed, mfu, gib, ratio])
        if "ours" not in case["systems"]:
            rows.append([case["case"], "ours: not measured", *[""] * (len(head) - 2)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def measure_case(case: Case, options: argparse.Namespace, platform: Platform) -> dict[str, Any]:
    """All rounds of a case. Collective over all ranks."""
    with tempfile.TemporaryDirectory() as own:
        folders = [own]
        dist.broadcast_object_list(folders, src=0)
        workload = Workload(case, platform, Path(folders[0]), options.layout)
        benchmark = Benchmark(workload, options)
        benchmark.run()
        workload.setup.groups.destroy()
        cuda = platform.device.type == "cuda"
        return benchmark.result(peak_flops(torch.cuda.get_device_name(platform.device)) if cuda else None)


def main(arguments: list[str]) -> None:
    """Measure the cases and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", choices=list(CASES), metavar="NAME", help="may be repeated")
    parser.add_argument("--list", action="store_true", help="print the cases")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of a round (default 5)")
    parser.add_argument("--rounds", default="A-B-A-B-C", help="A: ours, B: HF compiled, C: HF plain")
    parser.add_argument("--peer-sequences", type=int, nargs="+", metavar="N", help="microbatches of the peer to try")
    parser.add_argument("--layout", default="", help="keys below `layout`, such as 'language.tp=2'")
    parser.add_argument("--json", type=Path, help="where results go")
    parser.add_argument("--profile", action="store_true", help="record kernels of each system once")
    parser.add_argument("--plot", type=Path, nargs="+", metavar="JSON", help="draw these results")
    parser.add_argument("--out", type=Path, default=Path("docs/step.png"), help="the picture of --plot")
    options = parser.parse_args(arguments)
    if not set(options.rounds.split("-")) <= set(SYSTEMS):
        parser.error("--rounds takes A, B and C with - between them")
    if options.plot:
        plot([json.loads(path.read_text()) for path in options.plot], options.out)
    if options.list:
        print("\n".join(f"{case.name:18} {case.about}" for case in CASES.values()))
    if not options.case:
        return
    platform = create_platform()
    if dist.get_world_size() > 1:
        options.rounds = options.rounds.replace("-C", "")
    cuda = platform.device.type == "cuda"
    device = torch.cuda.get_device_name(platform.device) if cuda else "CPU"
    results: list[dict[str, Any]] = []
    for name in options.case:
        case = CASES[name]
        if options.peer_sequences:
            case = replace(case, peer_sequences=tuple(options.peer_sequences))
        results.append(measure_case(case, options, platform))
        if platform.rank == 0 and options.json:  # a run that is cut short keeps what it has measured
            about = {"device": device, "torch": torch.__version__, "gpus": dist.get_world_size()}
            options.json.write_text(json.dumps(about | {"cases": results}, indent=1))
    if platform.rank == 0:
        print(f"\n{device}, torch {torch.__version__}")
        print("\n".join(table(results)), flush=True)
    destroy_distributed()


if __name__ == "__main__":
    main(sys.argv[1:])

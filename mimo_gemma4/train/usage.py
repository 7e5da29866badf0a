"""How each module spends a step: seconds busy and waiting, floating point operations, memory."""

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from mimo_gemma4.data.dataset import ShardDataset
from mimo_gemma4.data.manifest import StepManifest
from mimo_gemma4.flops import text_flops
from mimo_gemma4.model.mimo_model import MimoModel
from mimo_gemma4.optim.step_reduction import ModuleUsage, RankUsage
from mimo_gemma4.weights.lora import AdaptedModule

Moment = float | torch.cuda.Event
"""When the CPU or the GPU's stream reached a place in the program."""


def now(device: torch.device) -> Moment:
    """This moment; on a GPU, the moment at which it will have finished what is enqueued."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(start: Moment, end: Moment) -> float:
    """Seconds from `start` to `end`. A GPU must have passed both: this does not wait for it."""
    if isinstance(start, torch.cuda.Event):
        assert isinstance(end, torch.cuda.Event)
        return float(start.elapsed_time(end)) / 1e3
    assert isinstance(end, float)
    return end - start


class Stopwatch:
    """Time per (module, kind) of one step."""

    def __init__(self, device: torch.device):
        """Measure what is enqueued on `device`."""
        self._device = device
        self._spans: list[tuple[str, str, Moment, Moment]] = []

    @contextmanager
    def measure(self, module: str, kind: str) -> Iterator[None]:
        """Add the time of the block to (module, kind)."""
        start = now(self._device)
        yield
        self._spans.append((module, kind, start, now(self._device)))

    def collect(self) -> dict[tuple[str, str], float]:
        """Seconds per (module, kind) since the last call. On a GPU the measured work must be finished."""
        seconds: dict[tuple[str, str], float] = defaultdict(float)
        for module, kind, start, end in self._spans:
            seconds[module, kind] += seconds_between(start, end)
        self._spans.clear()
        return seconds


class UsageMeter:
    """Counts this rank's operations, and puts them and a stopwatch's times into a `RankUsage`."""

    def __init__(self, model: MimoModel, dataset: ShardDataset):
        """Operations follow from the manifest and the media headers of `dataset`."""
        self.model, self.dataset = model, dataset
        self.passes = {name: self._passes(name) for name in model.modules}

    def usage(self, manifest: StepManifest, seconds: Mapping[tuple[str, str], float]) -> RankUsage:
        """How this rank spent the step that `manifest` planned; `seconds` by (module, busy or wait)."""
        modules = torch.tensor(
            [self._module_usage(name, manifest, seconds) for name in self.model.layout.grids], dtype=torch.float64
        )
        return RankUsage(self.model.platform.put(modules), _peak_memory_gib(self.model.platform.device))

    def _module_usage(self, name: str, manifest: StepManifest, seconds: Mapping[tuple[str, str], float]) -> ModuleUsage:
        """A module's usage; zeros where this rank does not hold it."""
        if name not in self.model.modules:
            return ModuleUsage(0.0, 0.0, 0.0)
        return ModuleUsage(
            busy=seconds.get((name, "busy"), 0.0),
            wait=seconds.get((name, "wait"), 0.0),
            flops=self._flops(name, manifest),
        )

    def _passes(self, name: str) -> int:
        """Number of passes through a module's linears: forward, gradients of inputs, gradients of weights.

        An encoder's projector and adapters themselves count as free. Gradients of inputs also pass through a frozen
        language model or decoder, and through a module with adapters.
        """
        module = self.model.modules[name]
        adapters = set(module.adapters.parameters()) if isinstance(module, AdaptedModule) else set()
        projector = set(self.model.encoders[name].projector_parameters()) if name in self.model.encoders else set()
        negligible = adapters | projector
        if any(parameter.requires_grad for parameter in module.parameters() if parameter not in negligible):
            return 3
        return 1 if name in self.model.encoders and not adapters else 2

    def _flops(self, name: str, manifest: StepManifest) -> float:
        """Operations of this rank's lane, reported by one rank of the lane and zero on the others."""
        grid = self.model.layout.grids[name]
        at = grid.coordinate(self.model.rank)
        if (at.tp, at.cp, at.pp) != (0, 0, 0):
            return 0.0
        if name == "language":
            lengths = [sample.length for sample in manifest.samples if sample.lane == at.dp]
            return text_flops(self.model.text, lengths).training(frozen=self.passes[name] == 2)
        media = [item for item in manifest.media if item.module == name and item.module_lane == at.dp]
        if name in self.model.decoders:
            return self.model.decoders[name].flops(item.soft_tokens for item in media) * self.passes[name]
        items = [self.dataset.media(item.index)[item.ordinal] for item in media]
        encoder = self.model.encoders[name]
        forward = encoder.flops(item.header for item in items if item.media_type != "video")
        forward += encoder.frame_flops(item.header for item in items if item.media_type == "video")
        return forward * self.passes[name]


def utilisation(usage: ModuleUsage, *, ranks: int, seconds: float, peak: float | None) -> dict[str, float | None]:
    """A module's shares of a step: `busy` and `wait` of its ranks' time, `mfu` of their peak operations.

    Args:
        usage: of the module, summed over its ranks.
        ranks: number of them.
        seconds: length of the step.
        peak: operations per second that one rank's device can do; None, and so `mfu`, where it is not known.
    """
    return {
        "mfu": usage.flops / seconds / (peak * ranks) if peak else None,
        "busy": usage.busy / seconds / ranks,
        "wait": usage.wait / seconds / ranks,
    }


def _peak_memory_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB

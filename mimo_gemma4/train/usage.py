"""How each module spends the step: seconds at work and waiting, floating point operations, memory."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from mimo_gemma4.data.dataset import ShardDataset
from mimo_gemma4.data.manifest import StepManifest
from mimo_gemma4.flops import text_flops
from mimo_gemma4.model.mimo_model import MimoModel
from mimo_gemma4.weights.lora import AdaptedModule

COLUMNS = ("busy", "wait", "flops")
"""What a rank tells per module: seconds computing, seconds waiting for what others send, operations of the step."""


Moment = float | torch.cuda.Event
"""When the CPU, or the GPU's stream, came to some place of the program."""


def now(device: torch.device) -> Moment:
    """This moment on `device`; on a GPU, the one at which it will have done what is enqueued."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(start: Moment, end: Moment) -> float:
    """Seconds from one moment to another, which a GPU must have passed: reading events does not wait for it."""
    if isinstance(start, torch.cuda.Event):
        assert isinstance(end, torch.cuda.Event)
        return start.elapsed_time(end) / 1e3
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


@dataclass(frozen=True)
class Usage:
    """What one rank tells of one step."""

    modules: torch.Tensor
    """fp64 [modules, 3] on the device: `COLUMNS` per module of the layout; zero where this rank does not hold it."""
    memory_gib: float
    """Largest device memory in use so far, in GiB; on the CPU, of the process."""


class UsageMeter:
    """Counts this rank's operations and turns a stopwatch's times into a `Usage`."""

    def __init__(self, model: MimoModel, dataset: ShardDataset):
        """Operations follow from the manifest and the media headers of `dataset`."""
        self.model, self.dataset = model, dataset
        self.passes = {name: self._passes(name) for name in model.modules}

    def usage(self, manifest: StepManifest, seconds: dict[tuple[str, str], float]) -> Usage:
        """What this rank did in the step that `manifest` planned."""
        table = torch.zeros(len(self.model.layout.grids), len(COLUMNS), dtype=torch.float64)
        for row, name in enumerate(self.model.layout.grids):
            if name in self.model.modules:
                table[row, 0], table[row, 1] = seconds.get((name, "busy"), 0.0), seconds.get((name, "wait"), 0.0)
                table[row, 2] = self._flops(name, manifest)
        return Usage(self.model.platform.put(table), _peak_memory_gib(self.model.platform.device))

    def _passes(self, name: str) -> int:
        """How often a module's linears work: forward, for the gradients of their inputs, and of their weights.

        The operations of an encoder's projector and of adapters are negligible; below adapters gradients still pass.
        """
        module = self.model.modules[name]
        adapters = set(module.adapters.parameters()) if isinstance(module, AdaptedModule) else set()
        projector = set(self.model.encoders[name].projector_parameters()) if name in self.model.encoders else set()
        negligible = adapters | projector
        if any(parameter.requires_grad for parameter in module.parameters() if parameter not in negligible):
            return 3
        return 1 if name in self.model.encoders and not adapters else 2

    def _flops(self, name: str, manifest: StepManifest) -> float:
        """Operations of this rank's data-parallel lane, told by one rank of the lane."""
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


def _peak_memory_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB

"""What the devices of all ranks do in a training step: how long transfers hold it up, and how long modules work.

A receiver's wait is exposed from when its soft tokens were ready where they come from, and it had come to need them,
until they are there; what it waited before is the other module's time, not the transfer's. Packing and posting, which
take the sender's stream, are exposed throughout. All times are the devices', on one clock: every rank marks its zero
behind a reduction over all ranks.
"""

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from mimo_gemma4.data.manifest import StepManifest
from mimo_gemma4.distributed.layout import Layout

Mark = float | torch.cuda.Event


@dataclass(frozen=True)
class Span:
    """One action of one rank, as `schedule.Action` names it."""

    module: str
    kind: str
    microbatch: int
    begin: float
    """Seconds from the step's zero."""
    end: float


class Timeline:
    """When this rank's device does what it is told; `span` is what a `StepRunner` wants as its `span`."""

    def __init__(self, device: torch.device) -> None:
        """Mark zero; collective over all ranks."""
        self.device = device
        self._marks: list[tuple[str, str, int, Mark, Mark]] = []
        dist.all_reduce(torch.zeros(1, device=device), group=dist.group.WORLD)
        self._zero = self._now()

    @contextmanager
    def span(self, module: str, kind: str, number: int) -> Iterator[None]:
        """Note when the block begins and ends."""
        begin = self._now()
        yield
        self._marks.append((module, kind, number, begin, self._now()))

    def spans(self) -> list[Span]:
        """All that has been noted; waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return [Span(*names, self._seconds(begin), self._seconds(end)) for *names, begin, end in self._marks]

    def _now(self) -> Mark:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, mark: Mark) -> float:
        if isinstance(mark, torch.cuda.Event) and isinstance(self._zero, torch.cuda.Event):
            return self._zero.elapsed_time(mark) / 1e3
        return mark - self._zero  # type: ignore[operator]


def exposed_seconds(layout: Layout, manifest: StepManifest, spans: Sequence[Sequence[Span]]) -> list[float]:
    """By rank, the exposed seconds of a step's transfers, from the spans of all ranks."""
    begun = {
        (rank, span.kind, span.module, span.microbatch): span.begin
        for rank, of_rank in enumerate(spans)
        for span in of_rank
    }
    sources = _sources(layout, manifest)
    exposed = []
    for rank, of_rank in enumerate(spans):
        total = 0.0
        for span in of_rank:
            if span.kind in SENDS:
                total += span.end - span.begin
            elif span.kind in RECEIVES:
                first, edge = RECEIVES[span.kind], (span.module, span.microbatch)
                ready = (begun[source, first, *edge] for source in sources[span.kind, *edge, rank])
                total += max(0.0, span.end - max(span.begin, *ready))
        exposed.append(total)
    return exposed


def busy_seconds(layout: Layout, spans: Sequence[Sequence[Span]]) -> dict[str, float]:
    """By module, the seconds that its passes take, on the mean of its ranks; from the spans of all ranks."""
    busy = dict.fromkeys(layout.grids, 0.0)
    for span in (span for of_rank in spans for span in of_rank if span.kind in PASSES):
        busy[span.module] += (span.end - span.begin) / len(layout.grids[span.module].ranks)
    return busy


PASSES = ("encode", "encoder_backward", "forward", "backward")
SENDS = ("send_soft_tokens", "post_recv_soft_tokens", "send_soft_token_gradients", "post_recv_soft_token_gradients")
RECEIVES = {"recv_soft_tokens": "send_soft_tokens", "recv_soft_token_gradients": "send_soft_token_gradients"}
"""Kinds of actions that wait, and what their sources do first when what is waited for is ready."""


def _sources(layout: Layout, manifest: StepManifest) -> dict[tuple[str, str, int, int], set[int]]:
    """(kind of receiving action, encoder, microbatch, rank) → ranks that what is received comes from."""
    sources = defaultdict(set)
    for item in manifest.media:
        encoder, language = layout.grids[item.module], layout.language
        above = [encoder.rank_at(tp=tp, dp=item.module_lane, pp=encoder.pp - 1) for tp in range(encoder.tp)]
        below = [language.rank_at(tp=tp, cp=cp, dp=item.lane) for tp in range(language.tp) for cp in range(language.cp)]
        for rank in below:
            sources["recv_soft_tokens", item.module, item.microbatch, rank].update(above)
        for rank in above:
            sources["recv_soft_token_gradients", item.module, item.microbatch, rank].update(below)
    return sources

"""How long training steps stand still because rows and their gradients travel, beside waiting for who makes them.

A receiver's wait is exposed from when its rows were ready where they come from, and it had come to need them, until
they are there; what it waited before is the other module's time, not the transfer's. Packing and posting, which take
the sender's stream, are exposed throughout. All times are the devices', on one clock: a step begins with a reduction
over all ranks, behind which every rank marks its zero.
"""

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from mimo_gemma4.data.manifest import StepManifest
from mimo_gemma4.layout import Layout
from mimo_gemma4.schedule import Action
from mimo_gemma4.step import _Execution

Mark = float | torch.cuda.Event


@dataclass(frozen=True)
class Span:
    """One action of one rank."""

    action: Action
    begin: float
    """Seconds from the step's zero."""
    end: float


class Timeline:
    """The actions of this rank in a step."""

    def __init__(self, device: torch.device) -> None:
        """Start without any."""
        self.device = device
        self._marks: list[tuple[Action, Mark, Mark]] = []
        self._zero: Mark = 0.0

    @contextmanager
    def record(self) -> Iterator[None]:
        """Note the actions of the step in the block; collective over all ranks."""
        perform = _Execution.perform

        def noted(execution: _Execution, action: Action) -> None:
            begin = self._now()
            perform(execution, action)
            self._marks.append((action, begin, self._now()))

        _Execution.perform = noted  # type: ignore[method-assign]
        dist.all_reduce(torch.zeros(1, device=self.device), group=dist.group.WORLD)
        self._zero = self._now()
        try:
            yield
        finally:
            _Execution.perform = perform  # type: ignore[method-assign]

    def spans(self) -> list[Span]:
        """What has been recorded since the last call; waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        marks, self._marks = self._marks, []
        return [Span(action, self._seconds(begin), self._seconds(end)) for action, begin, end in marks]

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
        (rank, span.action.kind, span.action.module, span.action.round): span.begin
        for rank, of_rank in enumerate(spans)
        for span in of_rank
    }
    sources = _sources(layout, manifest)
    exposed = []
    for rank, of_rank in enumerate(spans):
        total = 0.0
        for span in of_rank:
            kind, module, round_ = span.action.kind, span.action.module, span.action.round
            if kind in SENDS:
                total += span.end - span.begin
            elif kind in RECEIVES:
                ready = (
                    begun[source, RECEIVES[kind], module, round_] for source in sources[kind, module, round_, rank]
                )
                total += max(0.0, span.end - max(span.begin, *ready))
        exposed.append(total)
    return exposed


SENDS = ("send_rows", "expect_rows", "send_row_gradients", "expect_row_gradients")
RECEIVES = {"receive_rows": "send_rows", "receive_row_gradients": "send_row_gradients"}
"""Kinds of actions that wait, and what their sources do first when what is waited for is ready."""


def _sources(layout: Layout, manifest: StepManifest) -> dict[tuple[str, str, int, int], set[int]]:
    """(kind of receiving action, encoder, round, rank) → ranks that what is received comes from."""
    sources = defaultdict(set)
    for slot in manifest.media:
        encoder, language = layout.grids[slot.modality], layout.language
        above = [encoder.rank_at(tp=tp, dp=slot.encoder_lane, pp=encoder.pp - 1) for tp in range(encoder.tp)]
        below = [language.rank_at(tp=tp, cp=cp, dp=slot.lane) for tp in range(language.tp) for cp in range(language.cp)]
        for rank in below:
            sources["receive_rows", slot.modality, slot.microbatch, rank].update(above)
        for rank in above:
            sources["receive_row_gradients", slot.modality, slot.microbatch, rank].update(below)
    return sources

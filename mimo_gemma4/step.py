"""Executes the actions of one global step on this rank: encode, transfer, language, return, encoder backward."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from mimo_gemma4.bridge import Route
from mimo_gemma4.data.collate import LanguageBatch
from mimo_gemma4.data.loader import StepData
from mimo_gemma4.data.manifest import Microbatch
from mimo_gemma4.model import Media, MimoModel
from mimo_gemma4.schedule import Action, plan_step
from mimo_gemma4.usage import Stopwatch

Observer = Callable[[LanguageBatch, Microbatch, Media], None]

RUN_AHEAD = 2
"""Rounds that an encoder on its own ranks may be ahead of the gradients it waits for."""


@dataclass
class StepTotals:
    """What this rank adds to the step's totals; zero on ranks that hold no language module."""

    loss_sum: torch.Tensor
    """fp64 scalar: summed token loss of this CP rank's tokens, in nats."""
    loss_tokens: torch.Tensor
    """fp64 scalar: labels of this CP rank that are not -100."""
    tokens: int = 0
    """Real positions of this rank's language lane, padding excluded (host: the manifest knows)."""


class StepRunner:
    """Runs forward, or forward and backward, of whole global steps; gradients accumulate in the parameters."""

    def __init__(self, model: MimoModel):
        """Find out which edges carry gradients: those of encoders that train, told alike on every rank."""
        self.model = model
        self.trainable_edges = frozenset(name for name in model.layout.encoders if model.config.module(name).trains)
        self._stopwatch = Stopwatch(model.platform.device)
        self._finished_stopwatch = Stopwatch(model.platform.device)

    def run(self, data: StepData, train: bool = True, observe: Observer | None = None) -> StepTotals:
        """Execute the step's actions.

        Args:
            data: this rank's inputs.
            train: false leaves out the backward pass and the gradient transfers.
            observe: called on language ranks after each microbatch's forward, with its rows in place; on an idle lane
                with a microbatch of no rows.
        """
        self._finished_stopwatch, self._stopwatch = self._stopwatch, Stopwatch(self.model.platform.device)
        edges = self.trainable_edges if train else frozenset()
        execution = _Execution(self.model, self._stopwatch, data, edges, train, observe)
        actions = plan_step(
            data.manifest.rounds,
            self.model.layout.encoders,
            frozenset(self.model.modules),
            self.trainable_edges,
            RUN_AHEAD,
            train,
        )
        with torch.set_grad_enabled(train):
            for action in actions:
                execution.perform(action)
        for bridge in self.model.bridges.values():
            bridge.drain()
        return execution.totals

    def finished_seconds(self) -> dict[tuple[str, str], float]:
        """Seconds per (module, busy or wait) of the step before the last one run, which the device has finished."""
        return self._finished_stopwatch.collect()


class _Execution:
    """State of one step: outputs that wait for gradients, received rows, totals."""

    def __init__(
        self,
        model: MimoModel,
        stopwatch: Stopwatch,
        data: StepData,
        trainable_edges: frozenset[str],
        train: bool,
        observe: Observer | None,
    ):
        self.model, self.data, self.trainable_edges, self.train = model, data, trainable_edges, train
        self.stopwatch, self.observe = stopwatch, observe
        self.outputs: dict[tuple[str, int], torch.Tensor] = {}
        self.routes: dict[tuple[str, int], Route] = {}
        self.received: dict[tuple[str, int], torch.Tensor] = {}
        self.gradients: dict[tuple[str, int], torch.Tensor] = {}
        zero = torch.zeros((), dtype=torch.float64, device=model.platform.device)
        self.totals = StepTotals(zero.clone(), zero.clone())
        if model.language is not None:
            lane = model.layout.language.coordinate(model.rank).dp
            slots = [slot for slot in data.manifest.samples if slot.lane == lane]
            self.totals.tokens = sum(slot.length for slot in slots)

    def perform(self, action: Action) -> None:
        """Do one action and note the time it took; a rank with a language module counts transfers as its waiting."""
        moving = action.kind in ("transfer", "return")
        waiting = "language" if moving and self.model.language is not None else action.module
        with self.stopwatch.measure(waiting, "wait" if moving else "busy"):
            getattr(self, f"_{action.kind}")((action.module, action.round))

    def _encode(self, key: tuple[str, int]) -> None:
        inputs = self.data.media.get(key)
        if inputs is None:
            return
        with torch.set_grad_enabled(self.train and key[0] in self.trainable_edges):
            self.outputs[key] = self.model.encoders[key[0]](**self._to_device(inputs))

    def _transfer(self, key: tuple[str, int]) -> None:
        bridge = self.model.bridges[key[0]]
        route = self.routes[key] = bridge.route(self.data.manifest, key[1])
        rows = bridge.forward(route, self.outputs.get(key))
        if rows is not None:
            self.received[key] = rows.requires_grad_(key[0] in self.trainable_edges)
        if key[0] not in self.trainable_edges:  # nothing comes back for it
            self.outputs.pop(key, None)

    def _language(self, key: tuple[str, int]) -> None:
        round_ = key[1]
        language = self.model.language
        assert language is not None
        lane = self.model.layout.language.coordinate(self.model.rank).dp
        microbatch = self.data.manifest.microbatch(lane, round_)
        batch = self.data.language[round_]
        if not microbatch.rows:  # the lane idles; its peers on tensor and context parallel groups do so alike
            language.serve_experts()
            if self.observe is not None:
                self.observe(batch, microbatch, [])
            return
        tokens = self.model.local_tokens(batch, microbatch)
        media = [
            (self.routes[name, round_].positions, self.received[name, round_])
            for name in self.model.bridges
            if (name, round_) in self.received
        ]
        loss = language.loss(self.model.hidden(tokens, media), tokens.labels)
        if self.train and loss.requires_grad:  # not where all that reaches it is frozen
            loss.backward()
        self.totals.loss_sum += loss.detach()
        self.totals.loss_tokens += (tokens.labels >= 0).sum()
        if self.observe is not None:
            self.observe(batch, microbatch, media)
        for name in self.model.bridges:
            if name not in self.trainable_edges:
                self.received.pop((name, round_), None)

    def _return(self, key: tuple[str, int]) -> None:
        rows = self.received.pop(key, None)
        output = self.outputs.get(key)
        gradient = self.model.bridges[key[0]].backward(
            self.routes.pop(key), None if rows is None else rows.grad, 0 if output is None else len(output)
        )
        if gradient is not None:
            self.gradients[key] = gradient

    def _encoder_backward(self, key: tuple[str, int]) -> None:
        output, gradient = self.outputs.pop(key, None), self.gradients.pop(key, None)
        if output is not None and output.requires_grad:
            output.backward(gradient)

    def _to_device(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {
            name: self.model.platform.put(value) if isinstance(value, torch.Tensor) else value
            for name, value in inputs.items()
        }

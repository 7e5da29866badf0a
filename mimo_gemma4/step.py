"""Executes the actions of one global step on this rank."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from mimo_gemma4.bridge import Route
from mimo_gemma4.data.collate import LanguageBatch
from mimo_gemma4.data.loader import StepData
from mimo_gemma4.data.manifest import Microbatch, StepManifest
from mimo_gemma4.language.model import Gemma4LanguageModel
from mimo_gemma4.messages import Arrival
from mimo_gemma4.model import LocalTokens, Media, MimoModel
from mimo_gemma4.pipeline import Pipeline
from mimo_gemma4.profiling import Span, unrecorded
from mimo_gemma4.schedule import Action, plan_step
from mimo_gemma4.usage import Stopwatch

Observer = Callable[[LanguageBatch, Microbatch, Media], None]

WAITING = ("receive_rows", "receive_row_gradients", "receive_hidden", "receive_gradient")
"""Kinds of actions in which a rank waits for others."""


@dataclass
class StepTotals:
    """What this rank adds to the step's totals; losses are zero on ranks without the last language stage."""

    loss_sum: torch.Tensor
    """fp64 scalar: summed token loss of this CP rank's tokens, in nats."""
    loss_tokens: torch.Tensor
    """fp64 scalar: labels of this CP rank that are not -100."""
    tokens: int = 0
    """Real positions of this rank's language lane, padding excluded (host: the manifest knows)."""


class StepRunner:
    """Runs forward, or forward and backward, of whole global steps; gradients accumulate in the parameters."""

    def __init__(self, model: MimoModel, span: Span = unrecorded):
        """Find out which edges carry gradients: those of encoders that train, told alike on every rank.

        Args:
            model: this rank's modules.
            span: records the time of every action.
        """
        self.model, self.span = model, span
        encoders = model.layout.encoders
        self.trainable_edges = frozenset(name for name in encoders if model.config.module(name).trains)
        self.run_ahead = {name: model.config.module(name).run_ahead for name in encoders}
        self._stopwatch = Stopwatch(model.platform.device)
        self._finished_stopwatch = Stopwatch(model.platform.device)

    def run(self, data: StepData, train: bool = True, observe: Observer | None = None) -> StepTotals:
        """Execute the step's actions.

        Args:
            data: this rank's inputs.
            train: false leaves out the backward pass and the gradient transfers.
            observe: called on language ranks when a microbatch has gone through all stages, with the rows that were put
                in place on the first; on an idle lane with a microbatch of no rows. It may use the pipeline.
        """
        self._finished_stopwatch, self._stopwatch = self._stopwatch, Stopwatch(self.model.platform.device)
        edges = self.trainable_edges if train else frozenset()
        execution = _Execution(self.model, self._stopwatch, data, edges, train, observe)
        with torch.set_grad_enabled(train):
            for action in self.plan(data.manifest, train, observed=observe is not None):
                with self.span(action.module, action.kind, action.round):
                    execution.perform(action)
        for bridge in self.model.bridges.values():
            bridge.drain()
        if self.model.pipeline is not None:
            self.model.pipeline.drain()
        return execution.totals

    def plan(self, manifest: StepManifest, train: bool = True, observed: bool = False) -> list[Action]:
        """The actions of this rank in a step, in execution order."""
        return plan_step(
            self.model.layout,
            manifest,
            self.model.rank,
            trainable=self.trainable_edges,
            run_ahead=self.run_ahead,
            train=train,
            observed=observed,
        )

    def finished_seconds(self) -> dict[tuple[str, str], float]:
        """Seconds per (module, busy or wait) of the step before the last one run, which the device has finished."""
        return self._finished_stopwatch.collect()


@dataclass(frozen=True)
class _InFlight:
    """A microbatch that waits for its backward pass."""

    arrived: list[torch.Tensor]
    """What the previous stage sent: leaves that collect gradients."""
    outputs: list[torch.Tensor]
    """What the next stage was sent, or the loss; on an idle lane, what its experts served."""


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
        self.moving: dict[tuple[str, str, int], Arrival] = {}
        self.gradients: dict[tuple[str, int], torch.Tensor] = {}
        self.tokens: dict[int, LocalTokens] = {}
        self.expected: dict[tuple[str, int], Arrival] = {}
        self.arrived: dict[tuple[str, int], list[torch.Tensor]] = {}
        self.returning: dict[int, list[torch.Tensor]] = {}
        self.in_flight: dict[int, _InFlight] = {}
        zero = torch.zeros((), dtype=torch.float64, device=model.platform.device)
        self.totals = StepTotals(zero.clone(), zero.clone())
        self.lane = -1
        if model.language is not None:
            self.lane = model.layout.language.coordinate(model.rank).dp
            slots = [slot for slot in data.manifest.samples if slot.lane == self.lane]
            self.totals.tokens = sum(slot.length for slot in slots)

    def perform(self, action: Action) -> None:
        """Do one action and note the time it took; a rank with a language module counts transfers as its waiting."""
        moving = action.kind in WAITING
        waiting = "language" if moving and self.model.language is not None else action.module
        with self.stopwatch.measure(waiting, "wait" if moving else "busy"):
            getattr(self, f"_{action.kind}")((action.module, action.round))

    # --- encoders and their edges ---

    def _encode(self, key: tuple[str, int]) -> None:
        inputs = self.data.media.get(key)
        if inputs is None:
            return
        with torch.set_grad_enabled(self.train and key[0] in self.trainable_edges):
            self.outputs[key] = self.model.encoders[key[0]](**self._to_device(inputs))

    def _post_rows(self, key: tuple[str, int]) -> None:
        bridge = self.model.bridges[key[0]]
        route = self.routes[key] = bridge.route(self.data.manifest, key[1])
        self.moving["rows", *key] = bridge.post_rows(route, self.outputs.get(key))
        if key[0] not in self.trainable_edges:  # nothing comes back for it
            self.outputs.pop(key, None)

    _send_rows = _expect_rows = _post_rows

    def _receive_rows(self, key: tuple[str, int]) -> None:
        for rows in self.moving.pop(("rows", *key)).wait():
            self.received[key] = rows.requires_grad_(key[0] in self.trainable_edges)

    def _post_row_gradients(self, key: tuple[str, int]) -> None:
        rows = self.received.pop(key, None)
        gradients = None if rows is None else rows.grad
        self.moving["gradients", *key] = self.model.bridges[key[0]].post_gradients(self.routes[key], gradients)

    _send_row_gradients = _expect_row_gradients = _post_row_gradients

    def _receive_row_gradients(self, key: tuple[str, int]) -> None:
        arrival = self.moving.pop(("gradients", *key))
        self.gradients[key] = self.model.bridges[key[0]].output_gradient(self.routes[key], arrival)

    def _encoder_backward(self, key: tuple[str, int]) -> None:
        output, gradient = self.outputs.pop(key), self.gradients.pop(key)
        if output.requires_grad:
            output.backward(gradient)

    # --- language stage ---

    def _expect_hidden(self, key: tuple[str, int]) -> None:
        tokens = self._local_tokens(key[1])
        shapes = self._language.received_shapes(tokens.input_ids, tokens.context)
        self.expected["hidden", key[1]] = self._pipeline.forward.expect(shapes)

    def _receive_hidden(self, key: tuple[str, int]) -> None:
        arrived = self.expected.pop(("hidden", key[1])).wait()
        self.arrived["hidden", key[1]] = [tensor.requires_grad_(self.train) for tensor in arrived]

    def _forward(self, key: tuple[str, int]) -> None:
        round_ = key[1]
        if not self._microbatch(round_).rows:  # the lane idles; its peers on its stage do so alike
            served = self._language.serve_experts()
            if served is not None and self.train:
                self.in_flight[round_] = _InFlight([], [served])
            return
        tokens, arrived = self._local_tokens(round_), self.arrived.pop(("hidden", round_), [])
        outputs = self.model.run_stage(tokens, self.model.stage_inputs(tokens, self._media(round_), arrived))
        leaving = outputs.flat()
        if self._language.stage.last:
            loss = self._language.loss(outputs.hidden, tokens.labels)
            self.totals.loss_sum += loss.detach()
            self.totals.loss_tokens += (tokens.labels >= 0).sum()
            leaving = [loss]
        self.in_flight[round_] = _InFlight(arrived, leaving)
        del self.tokens[round_]
        if self.observe is None:
            self._release_media(round_)

    def _send_hidden(self, key: tuple[str, int]) -> None:
        self._pipeline.forward.send(self.in_flight[key[1]].outputs)
        if not self.train:
            del self.in_flight[key[1]]

    def _observe(self, key: tuple[str, int]) -> None:
        assert self.observe is not None
        self.observe(self.data.language[key[1]], self._microbatch(key[1]), self._media(key[1]))
        self._release_media(key[1])

    def _expect_gradient(self, key: tuple[str, int]) -> None:
        shapes = [tuple(tensor.shape) for tensor in self.in_flight[key[1]].outputs]
        self.expected["gradient", key[1]] = self._pipeline.backward.expect(shapes)

    def _receive_gradient(self, key: tuple[str, int]) -> None:
        self.arrived["gradient", key[1]] = self.expected.pop(("gradient", key[1])).wait()

    def _backward(self, key: tuple[str, int]) -> None:
        waiting = self.in_flight.pop(key[1], None)
        if waiting is None:  # the lane idles
            return
        torch.autograd.backward(waiting.outputs, self.arrived.pop(("gradient", key[1]), None))
        self.returning[key[1]] = waiting.arrived

    def _send_gradient(self, key: tuple[str, int]) -> None:
        gradients = [tensor.grad for tensor in self.returning.pop(key[1])]
        assert all(gradient is not None for gradient in gradients), "a stage was sent what it does not use"
        self._pipeline.backward.send(gradients)  # type: ignore[arg-type]

    @property
    def _language(self) -> Gemma4LanguageModel:
        assert self.model.language is not None
        return self.model.language

    @property
    def _pipeline(self) -> Pipeline:
        assert self.model.pipeline is not None
        return self.model.pipeline

    def _microbatch(self, round_: int) -> Microbatch:
        return self.data.manifest.microbatch(self.lane, round_)

    def _local_tokens(self, round_: int) -> LocalTokens:
        """This rank's tokens of a microbatch, cut when they are first asked for."""
        if round_ not in self.tokens:
            self.tokens[round_] = self.model.local_tokens(self.data.language[round_], self._microbatch(round_))
        return self.tokens[round_]

    def _media(self, round_: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Positions and rows that the bridges have brought for a microbatch."""
        return [
            (self.routes[name, round_].positions, self.received[name, round_])
            for name in self.model.bridges
            if (name, round_) in self.received
        ]

    def _release_media(self, round_: int) -> None:
        """Forget the rows that nothing goes back for."""
        for name in self.model.bridges:
            if name not in self.trainable_edges:
                self.received.pop((name, round_), None)

    def _to_device(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {
            name: self.model.platform.put(value) if isinstance(value, torch.Tensor) else value
            for name, value in inputs.items()
        }

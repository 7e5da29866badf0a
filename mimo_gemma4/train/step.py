"""Executes the actions of one global step on this rank."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from mimo_gemma4.data.collate import LanguageBatch
from mimo_gemma4.data.loader import StepData
from mimo_gemma4.data.manifest import Microbatch, StepManifest
from mimo_gemma4.distributed.layout import LANGUAGE
from mimo_gemma4.distributed.p2p import Arrival
from mimo_gemma4.distributed.pipeline import Shapes
from mimo_gemma4.encoders.base import StagedEncoder
from mimo_gemma4.language.model import Gemma4LanguageModel
from mimo_gemma4.model.bridge import Route
from mimo_gemma4.model.mimo_model import LocalTokens, Media, MimoModel
from mimo_gemma4.train.profiling import Span, unrecorded
from mimo_gemma4.train.schedule import Action, plan_step
from mimo_gemma4.train.usage import Stopwatch

Key = tuple[str, int]
"""Module and round: what an action is about."""
Observer = Callable[[LanguageBatch, Microbatch, Media], None]

WAITING = (
    *("receive_hidden", "receive_gradient", "receive_rows", "receive_row_gradients"),
    *("receive_states", "receive_state_gradients"),
)
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
    decoder_losses: dict[str, torch.Tensor] = field(default_factory=dict)
    """fp64 scalar by decoder that this rank holds: the loss summed over its lane's rows."""


class StepRunner:
    """Runs forward, or forward and backward, of whole global steps; gradients accumulate in the parameters."""

    def __init__(self, model: MimoModel, span: Span = unrecorded):
        """Run steps of `model`; `span` records the time of every action."""
        self.model, self.span = model, span
        self.run_ahead = {name: model.config.module(name).run_ahead for name in model.layout.encoders}
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
        execution = _Execution(self.model, self._stopwatch, data, train, observe)
        with torch.set_grad_enabled(train):
            for action in self.plan(data.manifest, train, observed=observe is not None):
                with self.span(action.module, action.kind, action.round):
                    execution.perform(action)
        for bridge in self.model.bridges.values():
            bridge.drain()
        for pipeline in self.model.pipelines.values():
            pipeline.drain()
        return execution.totals

    def plan(self, manifest: StepManifest, train: bool = True, observed: bool = False) -> list[Action]:
        """The actions of this rank in a step, in execution order."""
        return plan_step(
            self.model.layout,
            manifest,
            self.model.rank,
            trained_from=self.model.trained_from,
            run_ahead=self.run_ahead,
            train=train,
            observed=observed,
        )

    def finished_seconds(self) -> dict[tuple[str, str], float]:
        """Seconds per (module, busy or wait) of the step before the last one run, which the device has finished."""
        return self._finished_stopwatch.collect()


@dataclass(frozen=True)
class _InFlight:
    """A microbatch of a module's stage that waits for its backward pass."""

    arrived: list[torch.Tensor]
    """What the previous stage sent: leaves, which collect gradients where that stage has a backward pass."""
    outputs: list[torch.Tensor]
    """What the next stage was sent, an encoder's rows, or the loss and what decoders were given that send a gradient
    back; on an idle lane, what its experts served."""


class _Execution:
    """State of one step: what waits for gradients, what is on its way or has arrived, totals."""

    def __init__(
        self,
        model: MimoModel,
        stopwatch: Stopwatch,
        data: StepData,
        train: bool,
        observe: Observer | None,
    ):
        self.model, self.data, self.train = model, data, train
        self.trained_from: Mapping[str, int] = model.trained_from if train else {}
        self.stopwatch, self.observe = stopwatch, observe
        self.routes: dict[Key, Route] = {}
        self.received: dict[Key, torch.Tensor] = {}
        self.tokens: dict[int, LocalTokens] = {}
        self.moving: dict[tuple[str, str, int], Arrival] = {}
        self.hidden: dict[Key, list[torch.Tensor]] = {}
        self.given: dict[Key, torch.Tensor] = {}
        self.states: dict[Key, torch.Tensor] = {}
        self.gradients: dict[Key, list[torch.Tensor | None]] = {}
        self.returning: dict[Key, list[torch.Tensor]] = {}
        self.in_flight: dict[Key, _InFlight] = {}
        zero = torch.zeros((), dtype=torch.float64, device=model.platform.device)
        losses = {name: zero.clone() for name in model.decoders}
        self.totals = StepTotals(zero.clone(), zero.clone(), decoder_losses=losses)
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

    # --- passes ---

    def _forward(self, key: Key) -> None:
        if not self._microbatch(key[1]).rows:  # the lane idles; its peers on its stage do so alike
            served = self._language.serve_experts()
            if served is not None and self.train:
                self.in_flight[key] = _InFlight([], [served])
            return
        tokens, arrived = self._local_tokens(key[1]), self.hidden.pop(key, [])
        outputs = self.model.run_stage(tokens, self.model.stage_inputs(tokens, self._media(key[1]), arrived))
        leaving = outputs.flat()
        if self._language.stage.last:
            loss = self._language.loss(outputs.hidden, tokens.labels)
            self.totals.loss_sum += loss.detach()
            self.totals.loss_tokens += (tokens.labels >= 0).sum()
            leaving = [loss, *self._give_states(outputs.hidden, key[1])]
        self.in_flight[key] = _InFlight(arrived, leaving)
        del self.tokens[key[1]]
        if self.observe is None:
            self._release_media(key[1])

    def _encode(self, key: Key) -> None:
        arrived = self.hidden.pop(key, [])
        with torch.set_grad_enabled(self._returns(key[0])):
            output = self.model.encode(key[0], self.data.media[key], arrived)
        self.in_flight[key] = _InFlight(arrived, [output])

    def _backward(self, key: Key) -> None:
        waiting = self.in_flight.pop(key, None)
        if waiting is None:  # the lane idles
            return
        gradients: Any = self.gradients.pop(key, None)
        torch.autograd.backward(waiting.outputs, gradients)
        if returning := [tensor for tensor in waiting.arrived if tensor.requires_grad]:
            self.returning[key] = returning

    _encoder_backward = _backward

    def _decode(self, key: Key) -> None:
        name, states = key[0], self.states.pop(key)
        loss = self.model.decode(name, states, self.data.media[key])
        self.totals.decoder_losses[name] += loss.detach()
        if loss.requires_grad:
            (self.model.config.module(name).loss_weight * loss).backward()
        if name in self.trained_from:
            self.gradients[key] = [states.grad]

    def _observe(self, key: Key) -> None:
        assert self.observe is not None
        self.observe(self.data.language[key[1]], self._microbatch(key[1]), self._media(key[1]))
        self._release_media(key[1])

    # --- between the stages of a module ---

    def _expect_hidden(self, key: Key) -> None:
        self.moving["hidden", *key] = self.model.pipelines[key[0]].forward.expect(self._hidden_shapes(key))

    def _receive_hidden(self, key: Key) -> None:
        returns = self._returns(key[0], -1)
        self.hidden[key] = [tensor.requires_grad_(returns) for tensor in self.moving.pop(("hidden", *key)).wait()]

    def _send_hidden(self, key: Key) -> None:
        self.model.pipelines[key[0]].forward.send(self._leaving(key))

    def _expect_gradient(self, key: Key) -> None:
        shapes = [tuple(tensor.shape) for tensor in self.in_flight[key].outputs]
        self.moving["gradient", *key] = self.model.pipelines[key[0]].backward.expect(shapes)

    def _receive_gradient(self, key: Key) -> None:
        self.gradients[key] = [*self.moving.pop(("gradient", *key)).wait()]

    def _send_gradient(self, key: Key) -> None:
        gradients = [tensor.grad for tensor in self.returning.pop(key)]
        assert all(gradient is not None for gradient in gradients), "a stage was sent what it does not use"
        self.model.pipelines[key[0]].backward.send(gradients)  # type: ignore[arg-type]

    def _hidden_shapes(self, key: Key) -> Shapes:
        """Shapes of what the previous stage of a module sends."""
        name, round_ = key
        if name == LANGUAGE:
            tokens = self._local_tokens(round_)
            return self._language.received_shapes(tokens.input_ids, tokens.context)
        encoder = self.model.encoders[name]
        assert isinstance(encoder, StagedEncoder)
        return [encoder.hidden_shape(self.data.media[key])]

    def _leaving(self, key: Key) -> list[torch.Tensor]:
        """What a stage sends on; it is forgotten where nothing comes back for it."""
        if self._returns(key[0]):
            return self.in_flight[key].outputs
        return self.in_flight.pop(key).outputs

    def _returns(self, module: str, step: int = 0) -> bool:
        """Whether this rank's stage of a module, or the one `step` further on, has a backward pass."""
        if module == LANGUAGE:
            return self.train
        stage = self.model.layout.grids[module].coordinate(self.model.rank).pp + step
        return module in self.trained_from and stage >= self.trained_from[module]

    # --- between encoders and language ---

    def _post_rows(self, key: Key) -> None:
        route = self._route(key)
        rows = self._leaving(key)[0] if route.module.rows else None
        self.moving["rows", *key] = self.model.bridges[key[0]].post_to_language(route, rows)

    _send_rows = _expect_rows = _post_rows

    def _receive_rows(self, key: Key) -> None:
        arrival = self.moving.pop(("rows", *key))
        rows = self.model.bridges[key[0]].receive_in_language(self.routes[key], arrival)
        if len(rows):
            self.received[key] = rows.requires_grad_(key[0] in self.trained_from)

    def _post_row_gradients(self, key: Key) -> None:
        rows = self.received.pop(key, None)
        gradients = None if rows is None else rows.grad
        self.moving["row_gradients", *key] = self.model.bridges[key[0]].post_to_module(self.routes[key], gradients)

    _send_row_gradients = _expect_row_gradients = _post_row_gradients

    def _receive_row_gradients(self, key: Key) -> None:
        arrival = self.moving.pop(("row_gradients", *key))
        self.gradients[key] = [self.model.bridges[key[0]].receive_in_module(self.routes[key], arrival)]

    # --- between language and decoders ---

    def _give_states(self, hidden: torch.Tensor, round_: int) -> list[torch.Tensor]:
        """Take the rows for decoders out of the final hidden states; those of them that a gradient comes back for."""
        returning = []
        for name in self.model.layout.decoders:
            positions = self._route((name, round_)).positions
            if len(positions):
                given = hidden.flatten(0, 1).index_select(0, self.model.platform.put(positions))
                self.given[name, round_] = given
                returning += [given] if name in self.trained_from else []
        return returning

    def _post_states(self, key: Key) -> None:
        bridge = self.model.bridges[key[0]]
        self.moving["states", *key] = bridge.post_to_module(self._route(key), self.given.pop(key, None))

    _send_states = _expect_states = _post_states

    def _receive_states(self, key: Key) -> None:
        arrival = self.moving.pop(("states", *key))
        states = self.model.bridges[key[0]].receive_in_module(self.routes[key], arrival)
        self.states[key] = states.requires_grad_(key[0] in self.trained_from)

    def _post_state_gradients(self, key: Key) -> None:
        (gradients,) = self.gradients.pop(key, [None])
        self.moving["state_gradients", *key] = self.model.bridges[key[0]].post_to_language(self.routes[key], gradients)

    _send_state_gradients = _expect_state_gradients = _post_state_gradients

    def _receive_state_gradients(self, key: Key) -> None:
        arrival = self.moving.pop(("state_gradients", *key))
        returned = self.model.bridges[key[0]].receive_in_language(self.routes[key], arrival)
        if len(returned):
            # The loss needs none; what was given follows in the layout's order, as decoders have their turn.
            self.gradients.setdefault((LANGUAGE, key[1]), [None]).append(returned)

    # --- what a pass works on ---

    def _route(self, key: Key) -> Route:
        """This rank's part of a round of an edge."""
        if key not in self.routes:
            self.routes[key] = self.model.bridges[key[0]].route(self.data.manifest, key[1])
        return self.routes[key]

    @property
    def _language(self) -> Gemma4LanguageModel:
        assert self.model.language is not None
        return self.model.language

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
            if name not in self.trained_from:
                self.received.pop((name, round_), None)

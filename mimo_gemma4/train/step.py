"""Executes the actions of one global step on this rank."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from mimo_gemma4.data.collate import LanguageBatch
from mimo_gemma4.data.loader import StepData
from mimo_gemma4.data.manifest import Microbatch, StepManifest
from mimo_gemma4.distributed.layout import LANGUAGE
from mimo_gemma4.distributed.p2p import PendingRecv
from mimo_gemma4.distributed.pipeline import Shapes
from mimo_gemma4.encoders.base import StagedEncoder
from mimo_gemma4.language.model import Gemma4LanguageModel
from mimo_gemma4.model.bridge import Bridge, Route
from mimo_gemma4.model.mimo_model import LocalTokens, Media, MimoModel
from mimo_gemma4.train.profiling import Span, unrecorded
from mimo_gemma4.train.schedule import Action, ActionKind, plan_step
from mimo_gemma4.train.usage import Stopwatch

Observer = Callable[[LanguageBatch, Microbatch, Media], None]


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
    """fp64 scalar by decoder that this rank holds: the loss summed over its lane's soft tokens."""


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
            observe: called on language ranks when a microbatch has gone through all stages, with the soft tokens that
                the first has put in place; on an idle lane with an empty microbatch. It may use the pipeline.
        """
        self._finished_stopwatch, self._stopwatch = self._stopwatch, Stopwatch(self.model.platform.device)
        execution = _Execution(self.model, data, train, observe)
        with torch.set_grad_enabled(train):
            for action in self.plan(data.manifest, train, observed=observe is not None):
                # A rank with a language module counts transfers of other modules as its waiting, too.
                waiting = action.waits and self.model.language is not None
                module, kind = LANGUAGE if waiting else action.module, "wait" if action.waits else "busy"
                span = self.span(action.module, action.kind, action.microbatch)
                with span, self._stopwatch.measure(module, kind):
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


@dataclass
class _Work:
    """One microbatch of one module on this rank: what is on its way, has arrived, or waits for gradients.

    Of the language model or an encoder it is the rank's stage; of an encoder or decoder, also the edge to the language
    model, at either end. What has been used is taken out, so that its memory is free.
    """

    # --- a stage's passes ---
    inputs: list[torch.Tensor] = field(default_factory=list)
    """What the previous stage sent: leaves, which collect gradients where that stage has a backward pass."""
    outputs: list[torch.Tensor] = field(default_factory=list)
    """What waits for its backward pass: what the next stage was sent, an encoder's soft tokens, or the loss and what
    decoders were given that return a gradient; on an idle lane, what its experts served."""
    output_gradients: list[torch.Tensor] = field(default_factory=list)
    """Gradients of `outputs` that have arrived; the loss needs none."""
    tokens: LocalTokens | None = None
    """This rank's tokens of the language microbatch, until the forward pass is done."""
    returning_decoders: list[str] = field(default_factory=list)
    """On the last language stage: the decoders whose states are among `outputs`, in their order there."""

    # --- an edge ---
    route: Route | None = None
    """This rank's part of the edge."""
    soft_tokens: torch.Tensor | None = None
    """At the language end of an encoder's edge: its soft tokens among the local tokens [n, H], a leaf."""
    states: torch.Tensor | None = None
    """Of a decoder's edge: hidden states [n, H], given by the language model or, a leaf, received by the decoder."""
    state_gradients: torch.Tensor | None = None
    """Of a decoder's edge: gradients of `states`, made by the decoder or received by the language model."""

    pending: dict[str, PendingRecv] = field(default_factory=dict)
    """What is posted and not yet waited for, by `recv_…`."""


class _Execution:
    """State of one step: the work of every module and microbatch, and totals."""

    def __init__(self, model: MimoModel, data: StepData, train: bool, observe: Observer | None):
        self.model, self.data, self.train, self.observe = model, data, train, observe
        self.trained_from: Mapping[str, int] = model.trained_from if train else {}
        self.work: defaultdict[tuple[str, int], _Work] = defaultdict(_Work)
        zero = torch.zeros((), dtype=torch.float64, device=model.platform.device)
        losses = {name: zero.clone() for name in model.decoders}
        self.totals = StepTotals(zero.clone(), zero.clone(), decoder_losses=losses)
        self.lane = -1
        if model.language is not None:
            self.lane = model.layout.language.coordinate(model.rank).dp
            self.totals.tokens = sum(sample.length for sample in data.manifest.samples if sample.lane == self.lane)

    def perform(self, action: Action) -> None:
        """Do one action."""
        PERFORM[action.kind](self, action.module, action.microbatch)

    # --- passes ---

    def forward(self, module: str, number: int) -> None:
        """A language stage's forward pass, its loss on the last stage."""
        work = self.work[module, number]
        if not self._microbatch(number).sequences:  # the lane idles; its peers on its stage do so alike
            served = self._language.serve_experts()
            if served is not None and self.train:
                work.outputs = [served]
            return
        tokens, work.tokens = self._tokens(number), None
        outputs = self.model.run_stage(tokens, self.model.stage_inputs(tokens, self._media(number), work.inputs))
        work.outputs = outputs.flat()
        if self._language.stage.last:
            loss = self._language.loss(outputs.hidden, tokens.labels)
            self.totals.loss_sum += loss.detach()
            self.totals.loss_tokens += (tokens.labels >= 0).sum()
            work.outputs = [loss]
            self._give_states(outputs.hidden, number)
        if not self.train:
            work.inputs = []
        if self.observe is None:
            self._release_media(number)

    def _give_states(self, hidden: torch.Tensor, number: int) -> None:
        """Take decoders' states out of the final hidden states [S/(cp*tp), B, H] (local)."""
        work = self.work[LANGUAGE, number]
        for name in self.model.layout.decoders:
            positions = self._route(name, number).positions
            if not len(positions):
                continue
            states = hidden.flatten(0, 1).index_select(0, self.model.platform.put(positions))  # [n, H]
            self.work[name, number].states = states
            if name in self.trained_from:
                work.outputs.append(states)
                work.returning_decoders.append(name)

    def encode(self, module: str, number: int) -> None:
        """A stage of an encoder's forward pass."""
        work = self.work[module, number]
        returns = self._returns(module)
        with torch.set_grad_enabled(returns):
            work.outputs = [self.model.encode(module, self.data.media[module, number], work.inputs)]
        if not returns:
            work.inputs = []

    def backward(self, module: str, number: int) -> None:
        """A stage's backward pass, of the language model or an encoder."""
        work = self.work[module, number]
        outputs, work.outputs = work.outputs, []
        if not outputs:  # the lane idles
            return
        received, work.output_gradients = work.output_gradients, []
        gradients: list[torch.Tensor | None] | None = [*received] or None
        if work.returning_decoders:  # beside the loss, which needs no gradient
            gradients = [None, *(self._taken_state_gradients(name, number) for name in work.returning_decoders)]
        torch.autograd.backward(outputs, gradients)
        work.inputs = [tensor for tensor in work.inputs if tensor.requires_grad]

    def decode(self, module: str, number: int) -> None:
        """A decoder's forward and backward pass."""
        work = self.work[module, number]
        states, work.states = work.states, None
        assert states is not None
        loss = self.model.decode(module, states, self.data.media[module, number])
        self.totals.decoder_losses[module] += loss.detach()
        if loss.requires_grad:
            (self.model.config.module(module).loss_weight * loss).backward()
        if module in self.trained_from:
            work.state_gradients = states.grad

    def watch(self, module: str, number: int) -> None:
        """Let whoever watches look at the microbatch."""
        assert self.observe is not None
        self.observe(self.data.language[number], self._microbatch(number), self._media(number))
        self._release_media(number)

    # --- between the stages of a module ---

    def post_recv_forward(self, module: str, number: int) -> None:
        """Make room for what the previous stage sends."""
        posted = self.model.pipelines[module].forward.post_recv(self._input_shapes(module, number))
        self.work[module, number].pending["recv_forward"] = posted

    def recv_forward(self, module: str, number: int) -> None:
        """Wait for what the previous stage sends."""
        work, returns = self.work[module, number], self._returns(module, -1)
        work.inputs = [tensor.requires_grad_(returns) for tensor in work.pending.pop("recv_forward").wait()]

    def send_forward(self, module: str, number: int) -> None:
        """Send the next stage what it works on."""
        self.model.pipelines[module].forward.send(self._leaving(module, number))

    def post_recv_backward(self, module: str, number: int) -> None:
        """Make room for the gradients of what the next stage was sent."""
        work = self.work[module, number]
        shapes = [tuple(tensor.shape) for tensor in work.outputs]
        work.pending["recv_backward"] = self.model.pipelines[module].backward.post_recv(shapes)

    def recv_backward(self, module: str, number: int) -> None:
        """Wait for the gradients of what the next stage was sent."""
        work = self.work[module, number]
        work.output_gradients = work.pending.pop("recv_backward").wait()

    def send_backward(self, module: str, number: int) -> None:
        """Send the previous stage the gradients of what it sent."""
        work = self.work[module, number]
        inputs, work.inputs = work.inputs, []
        gradients = [tensor.grad for tensor in inputs if tensor.grad is not None]
        assert len(gradients) == len(inputs), "a stage was sent what it does not use"
        self.model.pipelines[module].backward.send(gradients)

    def _input_shapes(self, module: str, number: int) -> Shapes:
        """Shapes of what the previous stage of a module sends."""
        if module == LANGUAGE:
            tokens = self._tokens(number)
            return self._language.received_shapes(tokens.input_ids, tokens.context)
        encoder = self.model.encoders[module]
        assert isinstance(encoder, StagedEncoder)
        return [encoder.hidden_shape(self.data.media[module, number])]

    def _leaving(self, module: str, number: int) -> list[torch.Tensor]:
        """What a stage sends on; it is forgotten where nothing comes back for it."""
        work = self.work[module, number]
        outputs = work.outputs
        if not self._returns(module):
            work.outputs = []
        return outputs

    def _returns(self, module: str, step: int = 0) -> bool:
        """Whether this rank's stage of a module, or the one `step` further on, has a backward pass."""
        if module == LANGUAGE:
            return self.train
        stage = self.model.layout.grids[module].coordinate(self.model.rank).pp + step
        return module in self.trained_from and stage >= self.trained_from[module]

    # --- between encoders and language ---

    def post_soft_tokens(self, module: str, number: int) -> None:
        """Start the transfer of an encoder's soft tokens, at either end or both."""
        route = self._route(module, number)
        leaving = self._leaving(module, number)[0] if route.module.needed else None
        posted = self._bridge(module).post_to_language(route, leaving)
        self.work[module, number].pending["recv_soft_tokens"] = posted

    def recv_soft_tokens(self, module: str, number: int) -> None:
        """Wait for the soft tokens among the local tokens."""
        work = self.work[module, number]
        pending = work.pending.pop("recv_soft_tokens")
        received = self._bridge(module).recv_in_language(self._route(module, number), pending)
        if len(received):
            work.soft_tokens = received.requires_grad_(module in self.trained_from)

    def post_soft_token_gradients(self, module: str, number: int) -> None:
        """Start the transfer of the gradients of an encoder's soft tokens, at either end or both."""
        work = self.work[module, number]
        soft_tokens, work.soft_tokens = work.soft_tokens, None
        gradients = None if soft_tokens is None else soft_tokens.grad
        posted = self._bridge(module).post_to_module(self._route(module, number), gradients)
        work.pending["recv_soft_token_gradients"] = posted

    def recv_soft_token_gradients(self, module: str, number: int) -> None:
        """Wait for the gradients of the encoder's output."""
        work = self.work[module, number]
        pending = work.pending.pop("recv_soft_token_gradients")
        work.output_gradients = [self._bridge(module).recv_in_module(self._route(module, number), pending)]

    # --- between language and decoders ---

    def post_states(self, module: str, number: int) -> None:
        """Start the transfer of a decoder's states, at either end or both."""
        work = self.work[module, number]
        given, work.states = work.states, None
        work.pending["recv_states"] = self._bridge(module).post_to_module(self._route(module, number), given)

    def recv_states(self, module: str, number: int) -> None:
        """Wait for the states that the decoder works on."""
        work = self.work[module, number]
        pending = work.pending.pop("recv_states")
        states = self._bridge(module).recv_in_module(self._route(module, number), pending)
        work.states = states.requires_grad_(module in self.trained_from)

    def post_state_gradients(self, module: str, number: int) -> None:
        """Start the transfer of the gradients of a decoder's states, at either end or both."""
        work = self.work[module, number]
        gradients, work.state_gradients = work.state_gradients, None
        posted = self._bridge(module).post_to_language(self._route(module, number), gradients)
        work.pending["recv_state_gradients"] = posted

    def recv_state_gradients(self, module: str, number: int) -> None:
        """Wait for the gradients of the states that the language model has given."""
        work = self.work[module, number]
        pending = work.pending.pop("recv_state_gradients")
        work.state_gradients = self._bridge(module).recv_in_language(self._route(module, number), pending)

    def _taken_state_gradients(self, decoder: str, number: int) -> torch.Tensor:
        work = self.work[decoder, number]
        gradients, work.state_gradients = work.state_gradients, None
        assert gradients is not None, f"decoder {decoder} has returned no gradient for microbatch {number}"
        return gradients

    # --- what a pass works on ---

    def _bridge(self, module: str) -> Bridge:
        return self.model.bridges[module]

    def _route(self, module: str, number: int) -> Route:
        """This rank's part of a microbatch on an edge."""
        work = self.work[module, number]
        if work.route is None:
            work.route = self._bridge(module).route(self.data.manifest, number)
        return work.route

    @property
    def _language(self) -> Gemma4LanguageModel:
        assert self.model.language is not None
        return self.model.language

    def _microbatch(self, number: int) -> Microbatch:
        return self.data.manifest.microbatch(self.lane, number)

    def _tokens(self, number: int) -> LocalTokens:
        """This rank's tokens of a microbatch, cut when they are first asked for."""
        work = self.work[LANGUAGE, number]
        if work.tokens is None:
            work.tokens = self.model.local_tokens(self.data.language[number], self._microbatch(number))
        return work.tokens

    def _media(self, number: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Positions and soft tokens that the bridges have brought for a microbatch."""
        brought = ((name, self.work[name, number].soft_tokens) for name in self.model.bridges)
        return [(self._route(name, number).positions, tokens) for name, tokens in brought if tokens is not None]

    def _release_media(self, number: int) -> None:
        """Forget the soft tokens that no gradient goes back for."""
        for name in self.model.bridges:
            if name not in self.trained_from:
                self.work[name, number].soft_tokens = None


PERFORM: Mapping[ActionKind, Callable[[_Execution, str, int], None]] = {
    "forward": _Execution.forward,
    "backward": _Execution.backward,
    "encode": _Execution.encode,
    "encoder_backward": _Execution.backward,
    "decode": _Execution.decode,
    "observe": _Execution.watch,
    "post_recv_forward": _Execution.post_recv_forward,
    "recv_forward": _Execution.recv_forward,
    "send_forward": _Execution.send_forward,
    "post_recv_backward": _Execution.post_recv_backward,
    "recv_backward": _Execution.recv_backward,
    "send_backward": _Execution.send_backward,
    "post_recv_soft_tokens": _Execution.post_soft_tokens,
    "send_soft_tokens": _Execution.post_soft_tokens,
    "recv_soft_tokens": _Execution.recv_soft_tokens,
    "post_recv_soft_token_gradients": _Execution.post_soft_token_gradients,
    "send_soft_token_gradients": _Execution.post_soft_token_gradients,
    "recv_soft_token_gradients": _Execution.recv_soft_token_gradients,
    "post_recv_states": _Execution.post_states,
    "send_states": _Execution.post_states,
    "recv_states": _Execution.recv_states,
    "post_recv_state_gradients": _Execution.post_state_gradients,
    "send_state_gradients": _Execution.post_state_gradients,
    "recv_state_gradients": _Execution.recv_state_gradients,
}
"""How each kind of action is done. Both ends of an edge post one batch, so sending and receiving are one method."""

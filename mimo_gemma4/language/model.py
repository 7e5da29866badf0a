"""One pipeline stage of the Gemma 4 language model, with tensor, sequence and context parallelism."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from torch import nn
from torch.utils.checkpoint import checkpoint

from mimo_gemma4.errors import ConfigError
from mimo_gemma4.language.attention import AttentionInputs
from mimo_gemma4.language.attention_backend import AttentionBackend, PlanAttention
from mimo_gemma4.language.attention_context import AttentionContext
from mimo_gemma4.language.config import Gemma4TextConfig
from mimo_gemma4.language.embedding import TokenEmbedding
from mimo_gemma4.language.layer import DecoderLayer
from mimo_gemma4.language.loss import most_likely, softcapped, summed_cross_entropy
from mimo_gemma4.language.norm import RMSNorm
from mimo_gemma4.language.per_layer import PerLayerEmbedding
from mimo_gemma4.language.replicated import sum_over_token_shares
from mimo_gemma4.language.rotary import inverse_frequencies, rotary_tables
from mimo_gemma4.language.stages import LanguageStage, StageTensors
from mimo_gemma4.weights.bindings import ONES, Binding, GradientSum, bind_replicated


class Gemma4LanguageModel(MegatronModule):
    """One stage of embedding, decoder layers, final norm and tied head; without a pipeline, all of them.

    The first stage embeds. The last one has the norm and, as head, a copy of the embedding table. Every stage computes
    the per-layer inputs of its own layers.

    Weights are uninitialised until `initialise` or `load` of `weights.bindings` has filled `bindings()`.
    """

    def __init__(
        self,
        text: Gemma4TextConfig,
        groups: ProcessGroupCollection,
        *,
        sequence_parallel: bool,
        dtype: torch.dtype,
        device: torch.device,
        activation_checkpointing: str = "none",
        backend: Literal["local", "te"] = "local",
        attention: Literal["auto", "flex"] = "auto",
        stage: LanguageStage | None = None,
        prefix: str = "model.language_model.",
    ) -> None:
        """Build this rank's part.

        Args:
            text: hyperparameters.
            groups: process groups of the language grid; `tp`, `cp` and, where the model has experts, `ep` are read.
            sequence_parallel: cut hidden states over the tensor-parallel ranks along the sequence.
            dtype: of parameters and activations.
            device: where parameters live.
            activation_checkpointing: what backward computes again: `none`; `selective`, which is the same because
                attention never keeps scores; or `full`, all layers.
            backend, attention: kernels of attention, as `AttentionBackend` has them.
            stage: layers of this rank's pipeline stage; None: the whole model.
            prefix: of Hugging Face names: `model.language_model.`, or `model.` in a text-only checkpoint.

        Raises:
            LayoutError: the tensor or expert-parallel size does not fit the model.
            ConfigError: `activation_checkpointing` is unknown, or `backend` is not available.
        """
        if activation_checkpointing not in ("none", "selective", "full"):
            mode = activation_checkpointing
            raise ConfigError(f"train.activation_checkpointing = {mode!r}; known: none, selective, full")
        config = text.transformer_config(
            tp=groups.tp.size(),
            cp=groups.cp.size(),
            ep=groups.ep.size(),
            sequence_parallel=sequence_parallel,
            dtype=dtype,
            device=device,
        )
        super().__init__(config)
        self.text, self.prefix, self.tp_group = text, prefix, groups.tp
        self.shares_experts = text.num_experts > 0 and groups.ep.size() > 1
        """Whether this rank's experts serve tokens of other ranks too."""
        self.recompute_layers = activation_checkpointing == "full"
        self.attention = AttentionBackend(text, backend=backend, attention=attention, dtype=dtype, device=device)
        self.plan_attention: PlanAttention = self.attention.plan
        self.stage = stage = LanguageStage.whole(text.num_hidden_layers) if stage is None else stage
        self.embedding = self._embedding(groups)
        self.per_layer_embedding = None
        if text.hidden_size_per_layer_input:
            self.per_layer_embedding = PerLayerEmbedding(text, config, groups.tp, device, stage.layers)
        every = text.layers
        held = [every[number] for number in stage.layers]
        self.layers = nn.ModuleList(DecoderLayer(text, layer, config, groups, device) for layer in held)
        self.layer_configs = {layer.index: layer for layer in (*held, *(every[number] for number in stage.received))}
        """By number, this stage's layers and those whose keys and values it receives."""
        self.sources = {layer.key_value_source for layer in every if not layer.owns_key_values}
        """Layers whose keys and values other layers use, too."""
        self.norm = self._final_norm(device)
        self.head_dims = {layer.attention: layer.head_dim for layer in held}
        # Plain attributes: a buffer would be rounded by a cast of the module.
        self.frequencies = {
            name: inverse_frequencies(text.rope_parameters[name], head_dim).to(device)
            for name, head_dim in self.head_dims.items()
        }

    def _embedding(self, groups: ProcessGroupCollection) -> TokenEmbedding | None:
        """The table of the first stage, and of the last, where it is the head; None on stages between them."""
        text, stage = self.text, self.stage
        if not (stage.first or stage.last):
            return None
        return TokenEmbedding(
            text.vocab_size,
            text.hidden_size,
            scaled_by=text.hidden_size,
            padding_id=text.pad_token_id,
            config=self.config,
            tp_group=groups.tp,
        )

    def _final_norm(self, device: torch.device) -> RMSNorm | None:
        """The norm before the head, on the last stage."""
        if not self.stage.last:
            return None
        text, dtype = self.text, self.config.params_dtype
        return RMSNorm(text.hidden_size, text.rms_norm_eps, dtype=dtype, device=device)

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Scaled embeddings of ids [B, S/cp] (local) → [S/(cp*tp), B, H] (local); placeholders embed as padding.

        On the first stage only.
        """
        assert self.embedding is not None
        return self.embedding(self._without_placeholders(input_ids))

    def first_inputs(self, embeddings: torch.Tensor) -> StageTensors:
        """Inputs of the first stage: `embeddings` from `embed`, with soft tokens spliced in."""
        return StageTensors(embeddings, None if self.per_layer_embedding is None else embeddings)

    def forward(self, inputs: StageTensors, input_ids: torch.Tensor, context: AttentionContext) -> StageTensors:
        """Inputs of the next stage; on the last stage only the hidden states behind the final norm.

        `inputs` come from the previous stage or `first_inputs`; `input_ids` [B, S/cp] (local) still hold the
        placeholders. Hidden states are [S/(cp*tp), B, H] (local), without sequence parallelism [S/cp, B, H] (local).
        """
        layer_inputs: tuple[torch.Tensor | None, ...] = (None,) * len(self.layers)
        if self.per_layer_embedding is not None:
            layer_inputs = self.per_layer_embedding(inputs.embeddings, self._without_placeholders(input_ids))
        hidden, shared = inputs.hidden, dict(inputs.shared)
        attention = {name: self._attention_inputs(name, context, hidden.dtype) for name in self.frequencies}
        for number, decode, layer_input in zip(self.stage.layers, self.layers, layer_inputs, strict=True):
            layer = self.layer_configs[number]
            arguments = (hidden, layer_input, attention[layer.attention], shared.get(layer.key_value_source))
            hidden, key_values = self._recomputed(decode, *arguments)
            if number in self.sources:
                shared[number] = key_values
        if self.norm is not None:
            return StageTensors(self.norm(hidden))
        return StageTensors(hidden, inputs.embeddings, {layer: shared[layer] for layer in self.stage.sent})

    def received_shapes(self, input_ids: torch.Tensor, context: AttentionContext) -> list[tuple[int, ...]]:
        """Shapes of the tensors that the previous stage sends, `StageTensors.flat`, for a microbatch's local tokens."""
        batch, length = input_ids.shape
        if self.config.sequence_parallel:
            length //= self.tp_group.size()
        states = (length, batch, self.text.hidden_size)
        shapes: list[tuple[int, ...]] = [states] * (1 if self.per_layer_embedding is None else 2)
        for number in self.stage.received:
            layer = self.layer_configs[number]
            heads = max(1, layer.num_key_value_heads // self.tp_group.size())
            shapes += [(context.keys[layer.attention].count, batch, heads, layer.head_dim)] * 2
        return shapes

    def received(self, tensors: Sequence[torch.Tensor]) -> StageTensors:
        """The tensors that the previous stage has sent, as `StageTensors`."""
        return StageTensors.of(tensors, self.stage.received, self.per_layer_embedding is not None)

    def serve_experts(self) -> torch.Tensor | None:
        """Run this stage's experts for a microbatch in which only other lanes have tokens.

        Enters each collective of the expert-parallel group that `forward` enters on the other lanes. The backward pass
        of the result, a scalar, enters those of their backward pass and computes the experts' gradients. Returns None
        at once where experts serve no other ranks.
        """
        if not self.shares_experts:
            return None
        parameter = next(self.parameters())
        hidden = parameter.new_empty((0, 1, self.text.hidden_size), requires_grad=torch.is_grad_enabled())
        for layer in self.layers:
            hidden = self._recomputed(cast(DecoderLayer, layer).serve_experts, hidden)
        return hidden.sum()

    def _recomputed(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """The function's result; backward computes it again if activation checkpointing is `full`."""
        if self.recompute_layers and torch.is_grad_enabled():
            return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
        return function(*arguments)

    def loss(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Cross entropy in nats summed over this context-parallel rank's tokens with labels [B, S/cp] (local) != -100.

        The fp32 scalar is equal on all tensor-parallel ranks; `hidden` is the result of the last stage's `forward`.
        """
        return summed_cross_entropy(
            self._for_head(hidden).flatten(0, 1),  # [S/(cp*tp), B, H] → [S/cp * B, H]
            self._head_weight,
            labels.t().flatten(),  # [B, S/cp] → [S/cp * B]
            cap=self.text.final_logit_softcapping,
            tp_group=self.tp_group,
        )

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Softcapped fp32 logits [B, S/cp, vocabulary/tp] (local) of the last stage's hidden states."""
        logits = F.linear(self._for_head(hidden), self._head_weight)
        return softcapped(logits, self.text.final_logit_softcapping).transpose(0, 1)

    @torch.no_grad()
    def greedy_tokens(self, hidden: torch.Tensor) -> torch.Tensor:
        """The most likely next token of every local position: ids [B, S/cp] (local), equal on tensor-parallel ranks.

        `hidden` is the result of the last stage's `forward`; logits exist for a few positions at a time.
        """
        states = self._for_head(hidden)  # [S/cp, B, H]
        return torch.stack([most_likely(part, self._head_weight, self.tp_group) for part in states.unbind(1)])

    def bindings(self) -> list[Binding]:
        """What this rank holds of each Hugging Face tensor; the tied head has no binding beside the embedding's."""
        bound: list[Binding] = []
        if self.embedding is not None:
            stages: tuple[GradientSum, ...] = () if self.stage.first and self.stage.last else ("embd",)
            bound += self.embedding.bindings(f"{self.prefix}embed_tokens.weight", stages)
        if self.per_layer_embedding is not None:
            bound += self.per_layer_embedding.bindings(self.prefix)
        for number, layer in zip(self.stage.layers, self.layers, strict=True):
            bound += cast(DecoderLayer, layer).bindings(f"{self.prefix}layers.{number}.")
        if self.norm is not None:
            share = sum_over_token_shares(self.config)
            bound.append(bind_replicated(f"{self.prefix}norm.weight", self.norm.weight, ONES, gradient_sum=share))
        return bound

    @property
    def _head_weight(self) -> torch.Tensor:
        """[vocabulary / tp (local), H], on the last stage."""
        assert self.stage.last and self.embedding is not None
        return self.embedding.weight

    def _attention_inputs(self, name: str, context: AttentionContext, dtype: torch.dtype) -> AttentionInputs:
        """The inputs that all layers of attention type `name` share."""
        keys, frequencies = context.keys[name], self.frequencies[name]
        rotary = key_rotary = rotary_tables(context.positions, frequencies, dtype)
        if keys.positions is not None:
            key_rotary = rotary_tables(keys.positions, frequencies, dtype)
        return AttentionInputs(rotary, key_rotary, keys.exchange, self.plan_attention(keys, self.head_dims[name]))

    def unused_tensors(self) -> list[str]:
        """Keys and values that files may hold for layers that use another layer's; nothing reads them."""
        return self.text.unused_tensors(self.prefix)

    def _without_placeholders(self, input_ids: torch.Tensor) -> torch.Tensor:
        for placeholder in self.text.placeholder_ids:
            input_ids = input_ids.masked_fill(input_ids == placeholder, self.text.pad_token_id)
        return input_ids

    def _for_head(self, hidden: torch.Tensor) -> torch.Tensor:
        """[S/cp, B, H] on every tensor-parallel rank; in backward the ranks' parts of the gradient are summed."""
        if self.config.sequence_parallel:
            return gather_from_sequence_parallel_region(hidden, group=self.tp_group)
        return copy_to_tensor_model_parallel_region(hidden, group=self.tp_group)

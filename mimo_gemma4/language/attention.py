"""Self-attention of one Gemma 4 layer, with its own or another layer's keys and values."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from mimo_gemma4.language.attention_backend import AttentionPlan
from mimo_gemma4.language.config import Gemma4TextConfig, LayerConfig
from mimo_gemma4.language.key_exchange import KeyExchange, StartedExchange, States, finish_exchange, start_exchange
from mimo_gemma4.language.norm import RMSNorm, normalise
from mimo_gemma4.language.projection import project_first
from mimo_gemma4.language.replicated import OneHeadLinear
from mimo_gemma4.language.rotary import rotate
from mimo_gemma4.weights.bindings import Binding, Constant, Normal, bind_replicated, bind_sharded

Rotary = tuple[torch.Tensor, torch.Tensor]
"""Cosine and sine, each [S, B, 1, head_dim]."""


class AttentionInputs(NamedTuple):
    """What all layers of one attention type share in a microbatch."""

    rotary: Rotary
    """Tables of the local tokens, [S/cp] (local)."""
    key_rotary: Rotary
    """Tables of the K keys that local queries see, for layers whose keys travel unrotated; else as `rotary`."""
    exchange: KeyExchange | None
    """How keys of other context parallel ranks come here."""
    plan: AttentionPlan
    """Attends."""


class KeyValues(NamedTuple):
    """Normalised, rotated keys and normalised values of the K keys that local queries see.

    Each [K, B, key/value heads (local), head_dim].
    """

    key: torch.Tensor
    value: torch.Tensor


class SelfAttention(nn.Module):
    """Query, key and value norms, rotary embedding, attention without logit scale, output projection.

    Query heads are split over tensor parallel ranks, and so are key/value heads where there are enough of them; else
    every rank holds their small projection whole, uses the head of its queries, and the gradient is summed over ranks.
    """

    def __init__(
        self,
        text: Gemma4TextConfig,
        layer: LayerConfig,
        config: TransformerConfig,
        groups: ProcessGroupCollection,
        device: torch.device,
    ) -> None:
        """Allocate this rank's weights, uninitialised but for the norms."""
        super().__init__()
        self.text, self.layer, self.config, self.tp_group = text, layer, config, groups.tp
        ranks, rank = groups.tp.size(), groups.tp.rank()
        heads, head_dim = layer.num_key_value_heads, layer.head_dim
        self.projections = 2 if layer.has_value_projection else 1
        self.key_value_split = heads % ranks == 0
        self.query_size = text.num_attention_heads // ranks * head_dim
        self.key_value_size = heads // ranks * head_dim if self.key_value_split else head_dim
        fused = self.projections if layer.owns_key_values and self.key_value_split else 0
        self.fused_sizes = [self.query_size, *[self.key_value_size] * fused]
        self.linear_qkv = ColumnParallelLinear(
            text.hidden_size,
            ranks * sum(self.fused_sizes),
            config=config,
            init_method=config.init_method,
            bias=False,
            tp_group=groups.tp,
        )
        self.linear_proj = RowParallelLinear(
            ranks * self.query_size,
            text.hidden_size,
            config=config,
            init_method=config.init_method,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=False,
            tp_group=groups.tp,
        )
        # Their weights are shared by heads that live on different tensor parallel ranks.
        norm = {"dtype": config.params_dtype, "device": device, "partial_gradient": True}
        self.q_norm = RMSNorm(head_dim, text.rms_norm_eps, **norm)
        if layer.owns_key_values:
            self.k_norm = RMSNorm(head_dim, text.rms_norm_eps, **norm)
            if not self.key_value_split:
                self.linear_key_value = OneHeadLinear(
                    text.hidden_size,
                    self.projections,
                    heads,
                    head_dim,
                    head=rank * heads // ranks,
                    dtype=config.params_dtype,
                    device=device,
                )

    def forward(
        self, hidden: torch.Tensor, inputs: AttentionInputs, shared: KeyValues | None
    ) -> tuple[torch.Tensor, KeyValues]:
        """Attend from hidden [S/(cp*tp), B, H] (local) to `shared`, the source layer's keys and values, or to its own.

        Returns the projected result [S/(cp*tp), B, H] (local) and the keys and values that were attended to.
        """
        pending = None
        if shared is None and inputs.exchange is not None and not self._adapted:
            query_weight, key_value_weight = self._weights()
            own, whole = project_first(
                hidden, key_value_weight, self.tp_group, sequence_parallel=self.config.sequence_parallel
            )
            pending = self._start_exchange(own.chunk(self.projections, dim=-1), inputs)
            query = F.linear(whole, query_weight)
        else:
            query, *fused = self.linear_qkv(hidden)[0].split(self.fused_sizes, dim=-1)
            if shared is None:
                pending = self._start_exchange(fused or self._unsplit_key_values(hidden), inputs)
        query = rotate(self.q_norm(self._heads(query)), inputs.rotary)  # while keys and values are on their way, too
        if pending is not None:
            shared = self._key_values(finish_exchange(pending), inputs.key_rotary)
        assert shared is not None
        output, _ = self.linear_proj(inputs.plan.attend(query, shared.key, shared.value))
        return output, shared

    @property
    def _adapted(self) -> bool:
        """Whether something adds to the projections' outputs, as low-rank adapters do: then they are computed whole."""
        linears = [self.linear_qkv] if self.key_value_split else [self.linear_qkv, self.linear_key_value]
        return any(linear._forward_hooks for linear in linears)

    def _weights(self) -> tuple[torch.Tensor, ...]:
        """Rows of the queries, and of the keys and values: [rows (local), H] each."""
        if self.key_value_split:
            return self.linear_qkv.weight.split([self.query_size, sum(self.fused_sizes) - self.query_size])
        return self.linear_qkv.weight, self.linear_key_value.local_rows(self.linear_key_value.weight)

    def _start_exchange(self, projected: Sequence[torch.Tensor], inputs: AttentionInputs) -> StartedExchange:
        """Launch the exchange of what keys and values [S/cp, B, heads * head_dim] (local), just projected, become."""
        raw = [self._heads(part) for part in projected]
        return start_exchange(inputs.exchange, self._travelling(raw, inputs.rotary))

    def _heads(self, states: torch.Tensor) -> torch.Tensor:
        return states.unflatten(-1, (-1, self.layer.head_dim))

    def _unsplit_key_values(self, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Raw keys and values of the one head that this rank's queries use, where heads are fewer than ranks."""
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, group=self.tp_group)
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden, group=self.tp_group)
        return self.linear_key_value(hidden).chunk(self.projections, dim=-1)

    def _travelling(self, raw: list[torch.Tensor], rotary: Rotary) -> States:
        """What other ranks need of the local tokens: keys and values, or the raw keys where both come from those."""
        if not self.layer.has_value_projection:
            return tuple(raw)
        return rotate(self.k_norm(raw[0]), rotary), normalise(raw[1], self.text.rms_norm_eps)

    def _key_values(self, received: States, rotary: Rotary) -> KeyValues:
        """Keys and values from what has travelled; norms of raw keys see every rank's rows, in backward a part each."""
        if self.layer.has_value_projection:
            return KeyValues(*received)
        (raw,) = received
        return KeyValues(rotate(self.k_norm(raw), rotary), normalise(raw, self.text.rms_norm_eps))

    def bindings(self, prefix: str) -> list[Binding]:
        """Weights under `prefix` + `q_proj.weight` and so on."""
        drawn, group = Normal(self.text.initializer_range), self.tp_group
        # Scores are not divided by sqrt(head_dim): with these norms, those of random heads start with unit variance.
        calm = Constant(self.layer.head_dim**-0.25)
        qkv = self.linear_qkv.weight
        bound = [
            bind_sharded(f"{prefix}q_proj.weight", qkv, 0, group, drawn, at=slice(0, self.query_size)),
            bind_sharded(f"{prefix}o_proj.weight", self.linear_proj.weight, 1, group, drawn),
            bind_replicated(f"{prefix}q_norm.weight", self.q_norm.weight, calm),
        ]
        if not self.layer.owns_key_values:
            return bound
        bound.append(bind_replicated(f"{prefix}k_norm.weight", self.k_norm.weight, calm))
        size = self.key_value_size if self.key_value_split else self.layer.num_key_value_heads * self.layer.head_dim
        for number, name in enumerate(("k_proj", "v_proj")[: self.projections]):
            if self.key_value_split:
                weight, start, holders = qkv, self.query_size + number * size, group
            else:
                weight, start, holders = self.linear_key_value.weight, number * size, None
            bound.append(
                bind_sharded(f"{prefix}{name}.weight", weight, 0, holders, drawn, at=slice(start, start + size))
            )
        return bound

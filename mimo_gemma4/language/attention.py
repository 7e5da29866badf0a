"""Self-attention of one Gemma 4 layer, with its own or another layer's keys and values."""

from collections.abc import Sequence
from functools import partial
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
from mimo_gemma4.weights.bindings import Binding, GradientSum, Normal, bind_replicated, bind_sharded, qk_norm_init
from mimo_gemma4.weights.lora import has_adapter

Rotary = tuple[torch.Tensor, torch.Tensor]
"""Cosine and sine, each [S, B, 1, head_dim]."""


class AttentionInputs(NamedTuple):
    """What all layers of one attention type share in a microbatch."""

    rotary: Rotary
    """Tables of the local tokens."""
    key_rotary: Rotary
    """Tables of the K keys that local queries see, [K, B, 1, head_dim], for layers that exchange keys before rotation;
    for others as `rotary`."""
    exchange: KeyExchange | None
    """Brings keys from other context-parallel ranks; None: local queries see local keys only."""
    plan: AttentionPlan
    """Computes attention."""


class KeyValues(NamedTuple):
    """Normalised, rotated keys and normalised values of the K keys that local queries see.

    Each [K, B, key/value heads (local), head_dim].
    """

    key: torch.Tensor
    value: torch.Tensor


class SelfAttention(nn.Module):
    """Query, key and value norms, rotary embedding, attention without logit scale, output projection.

    Query heads are split over tensor-parallel ranks, and so are key/value heads where there are enough of them. If
    there are fewer heads than ranks, every rank holds their small projection whole and uses the head of its queries;
    the projection's gradient is summed over ranks.
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
        norm = partial(RMSNorm, head_dim, text.rms_norm_eps, dtype=config.params_dtype, device=device)
        # With context parallelism, `forward` also uses the parts of this weight by themselves.
        self.unfused_linears = [self.linear_qkv] if groups.cp.size() > 1 else []
        self.q_norm = norm()
        if layer.owns_key_values:
            self.k_norm = norm()
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
        """Self-attention of hidden [S/(cp*tp), B, H] (local).

        `shared` are the keys and values of the source layer; None: the layer computes its own. Returns the projected
        result [S/(cp*tp), B, H] (local) and the keys and values used.
        """
        pending = None
        if shared is None and inputs.exchange is not None and not self._has_adapters:
            query_weight, key_value_weight = self._weights()
            own, whole = project_first(
                hidden, key_value_weight, self.tp_group, sequence_parallel=self.config.sequence_parallel
            )
            pending = self._start_exchange(own.chunk(self.projections, dim=-1), inputs)
            query = F.linear(whole, query_weight)  # [S/cp, B, heads * head_dim (local)]
        else:
            query, *fused = self.linear_qkv(hidden)[0].split(self.fused_sizes, dim=-1)
            if shared is None:
                pending = self._start_exchange(fused or self._unsplit_key_values(hidden), inputs)
        # [S/cp, B, heads * head_dim] → [S/cp, B, heads, head_dim] (heads local), while keys and values travel
        query = self.q_norm.rotated(self._heads(query), inputs.rotary)
        if pending is not None:
            shared = self._key_values(finish_exchange(pending), inputs.key_rotary)
        assert shared is not None
        attended = inputs.plan.attend(query, shared.key, shared.value)  # [S/cp, B, heads * head_dim (local)]
        output, _ = self.linear_proj(attended)  # [S/(cp*tp), B, H] (local)
        return output, shared

    @property
    def _has_adapters(self) -> bool:
        """Whether adapters are attached: then the linears must compute the projections, not their weights alone."""
        linears = [self.linear_qkv] if self.key_value_split else [self.linear_qkv, self.linear_key_value]
        return any(map(has_adapter, linears))

    def _weights(self) -> tuple[torch.Tensor, ...]:
        """The queries' rows of the weights, and those of keys and values, each [rows (local), H]."""
        if self.key_value_split:
            return self.linear_qkv.weight.split([self.query_size, sum(self.fused_sizes) - self.query_size])
        return self.linear_qkv.weight, self.linear_key_value.local_rows(self.linear_key_value.weight)

    def _start_exchange(self, projected: Sequence[torch.Tensor], inputs: AttentionInputs) -> StartedExchange:
        """Start the exchange of keys and values from their projections, each [S/cp, B, heads * head_dim (local)]."""
        raw = [self._heads(part) for part in projected]
        return start_exchange(inputs.exchange, self._travelling(raw, inputs.rotary))

    def _heads(self, states: torch.Tensor) -> torch.Tensor:
        return states.unflatten(-1, (-1, self.layer.head_dim))

    def _unsplit_key_values(self, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Raw keys and values of the one head that this rank's queries use, for fewer heads than ranks."""
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, group=self.tp_group)
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden, group=self.tp_group)
        return self.linear_key_value(hidden).chunk(self.projections, dim=-1)

    def _travelling(self, raw: list[torch.Tensor], rotary: Rotary) -> States:
        """Keys and values of the local tokens as other ranks need them: only raw keys where values come from these."""
        if not self.layer.has_value_projection:
            return tuple(raw)
        return self.k_norm.rotated(raw[0], rotary), normalise(raw[1], self.text.rms_norm_eps)

    def _key_values(self, received: States, rotary: Rotary) -> KeyValues:
        """Keys and values of K keys from what `_travelling` gave on each rank."""
        if self.layer.has_value_projection:
            return KeyValues(*received)
        (raw,) = received
        return KeyValues(self.k_norm.rotated(raw, rotary), normalise(raw, self.text.rms_norm_eps))

    def bindings(self, prefix: str) -> list[Binding]:
        """Weights under `prefix` + `q_proj.weight` and so on."""
        drawn, group = Normal(self.text.initializer_range), self.tp_group
        norm = qk_norm_init(self.layer.head_dim)
        qkv = self.linear_qkv.weight
        # Norms, and an unsplit key/value projection, are whole on every rank, which applies them to its own heads.
        heads: tuple[GradientSum, ...] = ("tp",)
        bound = [
            bind_sharded(f"{prefix}q_proj.weight", qkv, 0, group, drawn, at=slice(0, self.query_size)),
            bind_sharded(f"{prefix}o_proj.weight", self.linear_proj.weight, 1, group, drawn),
            bind_replicated(f"{prefix}q_norm.weight", self.q_norm.weight, norm, gradient_sum=heads),
        ]
        if not self.layer.owns_key_values:
            return bound
        bound.append(bind_replicated(f"{prefix}k_norm.weight", self.k_norm.weight, norm, gradient_sum=heads))
        names = [f"{prefix}{name}.weight" for name in ("k_proj", "v_proj")[: self.projections]]
        if self.key_value_split:
            size, first = self.key_value_size, self.query_size
            for number, name in enumerate(names):
                rows = slice(first + number * size, first + (number + 1) * size)
                bound.append(bind_sharded(name, qkv, 0, group, drawn, at=rows))
            return bound
        size, whole = self.layer.num_key_value_heads * self.layer.head_dim, self.linear_key_value.weight
        for number, name in enumerate(names):
            rows = slice(number * size, (number + 1) * size)
            bound.append(bind_sharded(name, whole, 0, None, drawn, at=rows, gradient_sum=heads))
        return bound

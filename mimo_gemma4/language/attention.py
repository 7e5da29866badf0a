"""Self-attention of one Gemma 4 layer, with its own or another layer's keys and values."""

from typing import NamedTuple

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from mimo_gemma4.language.config import Gemma4TextConfig, LayerConfig
from mimo_gemma4.language.norm import RMSNorm, normalise
from mimo_gemma4.language.reference_attention import ReferenceAttention
from mimo_gemma4.language.replicated import OneHeadLinear
from mimo_gemma4.language.rotary import rotate
from mimo_gemma4.weights import Binding, Constant, Normal, bind_replicated, bind_sharded


class KeyValues(NamedTuple):
    """Normalised, rotated keys and normalised values of all tokens, each [S, B, key/value heads (local), head_dim]."""

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
        backend: ReferenceAttention,
        device: torch.device,
    ) -> None:
        """Allocate this rank's weights, uninitialised but for the norms."""
        super().__init__()
        self.text, self.layer, self.config, self.backend = text, layer, config, backend
        self.tp_group, self.cp_group = groups.tp, groups.cp
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
        self,
        hidden: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        plan: torch.Tensor,
        shared: KeyValues | None,
    ) -> tuple[torch.Tensor, KeyValues]:
        """Attend from hidden [S/(cp*tp), B, H] (local) to `shared`, the source layer's keys and values, or to its own.

        Returns the projected result [S/(cp*tp), B, H] (local) and the keys and values that were attended to.
        """
        projected, _ = self.linear_qkv(hidden)
        query, *own = projected.split(self.fused_sizes, dim=-1)
        query = rotate(self.q_norm(self._heads(query)), rotary)
        if shared is None:
            shared = self._key_values([self._heads(raw) for raw in own or self._unsplit_key_values(hidden)], rotary)
        output, _ = self.linear_proj(self.backend.attend(query, shared.key, shared.value, plan))
        return output, shared

    def _heads(self, states: torch.Tensor) -> torch.Tensor:
        return states.unflatten(-1, (-1, self.layer.head_dim))

    def _unsplit_key_values(self, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Raw keys and values of the one head that this rank's queries use, where heads are fewer than ranks."""
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, group=self.tp_group)
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden, group=self.tp_group)
        return self.linear_key_value(hidden).chunk(self.projections, dim=-1)

    def _key_values(self, own: list[torch.Tensor], rotary: tuple[torch.Tensor, torch.Tensor]) -> KeyValues:
        """Norms, rotation and CP gather of raw keys and values (the keys again where there is no value projection)."""
        key = rotate(self.k_norm(own[0]), rotary)
        value = normalise(own[-1], self.text.rms_norm_eps)
        if self.cp_group.size() > 1:
            # Backward is a reduce-scatter; layers that share the result add up their gradients before it.
            both = torch.stack((key, value), dim=1)
            key, value = gather_from_sequence_parallel_region(both, group=self.cp_group).unbind(dim=1)
        return KeyValues(key, value)

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

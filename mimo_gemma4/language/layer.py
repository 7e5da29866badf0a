"""One decoder layer of Gemma 4."""

from functools import partial

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from mimo_gemma4.language.attention import AttentionInputs, KeyValues, SelfAttention
from mimo_gemma4.language.config import Gemma4TextConfig, LayerConfig
from mimo_gemma4.language.mlp import GatedMLP
from mimo_gemma4.language.moe import MixtureOfExperts
from mimo_gemma4.language.norm import RMSNorm
from mimo_gemma4.language.per_layer import PerLayerInput
from mimo_gemma4.language.replicated import sum_over_token_shares
from mimo_gemma4.weights.bindings import ONES, Binding, bind_replicated, residual_norm_init


class DecoderLayer(nn.Module):
    """Attention, feed-forward network and per-layer input, each normalised before and after, then a fixed scalar.

    Experts, if the model has them, work on the same residual as the dense network, and the normalised results are
    added. Keys and values are arguments and results, never state, so recomputing the layer is exact.
    """

    def __init__(
        self,
        text: Gemma4TextConfig,
        layer: LayerConfig,
        config: TransformerConfig,
        groups: ProcessGroupCollection,
        device: torch.device,
    ) -> None:
        """Allocate this rank's weights, uninitialised but for the norms and the scalar."""
        super().__init__()
        self.text, self.config = text, config
        self.self_attention = SelfAttention(text, layer, config, groups, device)
        self.mlp = GatedMLP(layer.intermediate_size, config, groups.tp)
        norm = partial(RMSNorm, text.hidden_size, text.rms_norm_eps, dtype=config.params_dtype, device=device)
        self.input_layernorm = norm()
        self.post_attention_layernorm = norm()
        self.pre_feedforward_layernorm = norm()
        self.post_feedforward_layernorm = norm()
        self.moe: MixtureOfExperts | None = None
        if text.num_experts:
            self.moe = MixtureOfExperts(text, config, groups, device)
            self.post_feedforward_layernorm_1 = norm()
        self.per_layer_input = PerLayerInput(text, config, device) if text.hidden_size_per_layer_input else None
        self.layer_scalar: torch.Tensor
        self.register_buffer("layer_scalar", torch.ones(1, dtype=config.params_dtype, device=device))

    def forward(
        self,
        hidden: torch.Tensor,
        per_layer_input: torch.Tensor | None,
        attention: AttentionInputs,
        shared: KeyValues | None,
    ) -> tuple[torch.Tensor, KeyValues]:
        """Hidden states [S/(cp*tp), B, H] (local) for the next layer, and the keys and values that attention used."""
        attended, key_values = self.self_attention(self.input_layernorm(hidden), attention, shared)
        hidden = self.post_attention_layernorm.add_to(hidden, attended)
        if self.per_layer_input is None:
            fed = self._feed_forward(hidden)
            return self.post_feedforward_layernorm.add_to(hidden, fed, self.layer_scalar), key_values
        hidden = self.post_feedforward_layernorm.add_to(hidden, self._feed_forward(hidden))
        assert per_layer_input is not None
        return self.per_layer_input.add_to(hidden, per_layer_input, self.layer_scalar), key_values

    def _feed_forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.moe is None:
            return self.mlp(self.pre_feedforward_layernorm(hidden))
        routed = self.moe.route(hidden)  # first, so that the dense network hides its copy to the host
        dense = self.mlp(self.pre_feedforward_layernorm(hidden))
        return self.post_feedforward_layernorm_1(dense) + self.moe(routed)

    def serve_experts(self, nothing: torch.Tensor) -> torch.Tensor:
        """Run the experts for other lanes' tokens, on a lane that has none itself: [0, 1, H] → [0, 1, H]."""
        assert self.moe is not None
        return self.moe(self.moe.route(nothing))

    def bindings(self, prefix: str) -> list[Binding]:
        """Weights under the names of transformers' decoder layer."""
        residual, share = residual_norm_init(self.text.num_hidden_layers), sum_over_token_shares(self.config)
        norms = {
            "input_layernorm": (self.input_layernorm, ONES),
            "post_attention_layernorm": (self.post_attention_layernorm, residual),
            "pre_feedforward_layernorm": (self.pre_feedforward_layernorm, ONES),
            "post_feedforward_layernorm": (self.post_feedforward_layernorm, residual),
        }
        if self.moe is not None:
            norms["post_feedforward_layernorm_1"] = (self.post_feedforward_layernorm_1, ONES)
        return [
            *self.self_attention.bindings(f"{prefix}self_attn."),
            *self.mlp.bindings(f"{prefix}mlp."),
            *(self.moe.bindings(prefix) if self.moe is not None else ()),
            *(
                bind_replicated(f"{prefix}{name}.weight", norm.weight, initial, gradient_sum=share)
                for name, (norm, initial) in norms.items()
            ),
            *(self.per_layer_input.bindings(prefix) if self.per_layer_input is not None else ()),
            bind_replicated(f"{prefix}layer_scalar", self.layer_scalar, ONES),
        ]

"""Per-layer embeddings: small vectors computed from each token's id and embedding, an extra input of every layer."""

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn
from torch.distributed import ProcessGroup

from mimo_gemma4.language.config import Gemma4TextConfig
from mimo_gemma4.language.embedding import TokenEmbedding
from mimo_gemma4.language.norm import RMSNorm
from mimo_gemma4.language.replicated import sum_over_token_shares
from mimo_gemma4.weights.bindings import (
    ONES,
    Binding,
    GradientSum,
    Initial,
    Normal,
    bind_replicated,
    part_of,
    residual_norm_init,
)
from mimo_gemma4.weights.main_gradients import linear


class PerLayerEmbedding(nn.Module):
    """From token ids and embeddings with soft tokens to the inputs of the layers of one pipeline stage.

    A stage holds its layers' columns of the table and rows of the projection; the norm is common to all stages. The
    table is split over the vocabulary. The small projection is replicated and applied to the tokens that the rank
    holds, so its only communication is the sum of its gradient under sequence parallelism.
    """

    def __init__(
        self,
        text: Gemma4TextConfig,
        config: TransformerConfig,
        tp_group: ProcessGroup,
        device: torch.device,
        layers: range,
    ) -> None:
        """Allocate this rank's weights for `layers`, uninitialised but for the norm."""
        super().__init__()
        self.text, self.config = text, config
        self.size, self.layers = text.hidden_size_per_layer_input, layers
        width = len(layers) * self.size
        self.table = TokenEmbedding(
            text.vocab_size_per_layer_input,
            width,
            scaled_by=self.size,
            padding_id=text.pad_token_id,
            config=config,
            tp_group=tp_group,
        )
        self.projection = _Linear(text.hidden_size, width, config, device)
        self.norm = RMSNorm(self.size, text.rms_norm_eps, dtype=config.params_dtype, device=device)

    def forward(self, embeddings: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Inputs of every layer of the stage, each [S/(cp*tp), B, size] (local).

        `embeddings` [S/(cp*tp), B, H] (local) are scaled and hold the soft tokens; `ids` [B, S/cp] (local) hold the
        padding id in place of placeholders. Values are rounded in the same order as in transformers'
        `project_per_layer_inputs`.
        """
        projected = self.projection(embeddings) * self.text.hidden_size**-0.5
        context = self.norm(projected.unflatten(-1, (-1, self.size)))  # [S/(cp*tp), B, layers, size]
        identity = self.table(ids).unflatten(-1, (-1, self.size))
        return ((context + identity) * 2.0**-0.5).unbind(dim=2)

    def bindings(self, prefix: str) -> list[Binding]:
        """The table, the projection and its norm, under the names of transformers' text model."""
        start, width = self.layers.start * self.size, self.text.num_hidden_layers * self.size
        drawn, share = Normal(self.text.initializer_range), sum_over_token_shares(self.config)
        stages: tuple[GradientSum, ...] = ("pp",) if len(self.layers) < self.text.num_hidden_layers else ()
        (table,) = self.table.bindings(f"{prefix}embed_tokens_per_layer.weight")
        projection = bind_replicated(
            f"{prefix}per_layer_model_projection.weight", self.projection.weight, drawn, gradient_sum=share
        )
        name = f"{prefix}per_layer_projection_norm.weight"
        return [
            part_of(table, 1, start, width),
            part_of(projection, 0, start, width),
            bind_replicated(name, self.norm.weight, ONES, gradient_sum=share + stages),
        ]


class PerLayerInput(nn.Module):
    """One layer's use of its input: (h + norm(projection(gelu(gate(h)) * input))) * scale."""

    def __init__(self, text: Gemma4TextConfig, config: TransformerConfig, device: torch.device) -> None:
        """Allocate the replicated weights, uninitialised but for the norm."""
        super().__init__()
        self.text, self.config, size = text, config, text.hidden_size_per_layer_input
        self.gate = _Linear(text.hidden_size, size, config, device)
        self.projection = _Linear(size, text.hidden_size, config, device)
        self.norm = RMSNorm(text.hidden_size, text.rms_norm_eps, dtype=config.params_dtype, device=device)

    def add_to(self, hidden: torch.Tensor, per_layer_input: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """(hidden + norm(…)) * scale of [S/(cp*tp), B, H] and [S/(cp*tp), B, size] (local) → [S/(cp*tp), B, H]."""
        gated = F.gelu(self.gate(hidden), approximate="tanh") * per_layer_input
        return self.norm.add_to(hidden, self.projection(gated), scale)

    def bindings(self, prefix: str) -> list[Binding]:
        """Weights under the names of transformers' decoder layer."""
        drawn, residual = Normal(self.text.initializer_range), residual_norm_init(self.text.num_hidden_layers)
        weights: dict[str, tuple[torch.Tensor, Initial]] = {
            "per_layer_input_gate": (self.gate.weight, drawn),
            "per_layer_projection": (self.projection.weight, drawn),
            "post_per_layer_input_norm": (self.norm.weight, residual),
        }
        share = sum_over_token_shares(self.config)
        return [
            bind_replicated(f"{prefix}{name}.weight", weight, initial, gradient_sum=share)
            for name, (weight, initial) in weights.items()
        ]


class _Linear(nn.Linear):
    """A linear that every tensor-parallel rank applies to the tokens it holds."""

    def __init__(self, inputs: int, outputs: int, config: TransformerConfig, device: torch.device) -> None:
        super().__init__(inputs, outputs, bias=False, dtype=config.params_dtype, device=device)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """[..., inputs] → [..., outputs]."""
        return linear(inputs, self.weight)

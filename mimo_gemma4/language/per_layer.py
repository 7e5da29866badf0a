"""Per-layer embeddings: every layer gets a small vector of each token's id and embedding besides the hidden states."""

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn
from torch.distributed import ProcessGroup

from mimo_gemma4.language.config import Gemma4TextConfig
from mimo_gemma4.language.embedding import TokenEmbedding
from mimo_gemma4.language.norm import RMSNorm
from mimo_gemma4.language.replicated import ReplicatedLinear
from mimo_gemma4.weights.bindings import (
    ONES,
    Binding,
    Normal,
    bind_replicated,
    branch_norm,
    part_of,
    share_between_stages,
)


class PerLayerEmbedding(nn.Module):
    """From token ids and (spliced) embeddings to the inputs of the layers of one pipeline stage.

    The table's columns and the projection's rows are those of these layers; the norm is common to all stages.
    The table of ids is split over the vocabulary; the small projection is replicated and works on whatever tokens the
    rank holds, so that it needs no communication but the sum of its gradient under sequence parallelism.
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
        self.text, self.size, self.layers = text, text.hidden_size_per_layer_input, layers
        width = len(layers) * self.size
        self.table = TokenEmbedding(
            text.vocab_size_per_layer_input,
            width,
            scaled_by=self.size,
            padding_id=text.pad_token_id,
            config=config,
            tp_group=tp_group,
        )
        self.projection = _linear(text.hidden_size, width, config, device)
        self.norm = RMSNorm(
            self.size,
            text.rms_norm_eps,
            dtype=config.params_dtype,
            device=device,
            partial_gradient=config.sequence_parallel,
        )
        if len(layers) < text.num_hidden_layers:
            share_between_stages(self.norm.weight, "pp")

    def forward(self, embeddings: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Inputs of every layer of the stage, each [S/(cp*tp), B, size] (local).

        `embeddings` [S/(cp*tp), B, H] (local) are scaled and hold the media rows; `ids` [B, S/cp] (local) hold the
        padding id in place of media. The order of roundings is that of transformers' `project_per_layer_inputs`.
        """
        projected = self.projection(embeddings) * self.text.hidden_size**-0.5
        context = self.norm(projected.unflatten(-1, (-1, self.size)))
        identity = self.table(ids).unflatten(-1, (-1, self.size))
        return ((context + identity) * 2.0**-0.5).unbind(dim=2)

    def bindings(self, prefix: str) -> list[Binding]:
        """The table, the projection and its norm, under the names of transformers' text model."""
        start, width = self.layers.start * self.size, self.text.num_hidden_layers * self.size
        drawn = Normal(self.text.initializer_range)
        (table,) = self.table.bindings(f"{prefix}embed_tokens_per_layer.weight")
        projection = bind_replicated(f"{prefix}per_layer_model_projection.weight", self.projection.weight, drawn)
        return [
            part_of(table, 1, start, width),
            part_of(projection, 0, start, width),
            bind_replicated(f"{prefix}per_layer_projection_norm.weight", self.norm.weight, ONES),
        ]


class PerLayerInput(nn.Module):
    """How one layer takes its input in: norm(projection(gelu(gate(h)) * input)), to be added to h."""

    def __init__(self, text: Gemma4TextConfig, config: TransformerConfig, device: torch.device) -> None:
        """Allocate the replicated weights, uninitialised but for the norm."""
        super().__init__()
        self.text, size = text, text.hidden_size_per_layer_input
        self.gate = _linear(text.hidden_size, size, config, device)
        self.projection = _linear(size, text.hidden_size, config, device)
        self.norm = RMSNorm(
            text.hidden_size,
            text.rms_norm_eps,
            dtype=config.params_dtype,
            device=device,
            partial_gradient=config.sequence_parallel,
        )

    def forward(self, hidden: torch.Tensor, per_layer_input: torch.Tensor) -> torch.Tensor:
        """From [S/(cp*tp), B, H] and [S/(cp*tp), B, size] (local) to what is added to `hidden`."""
        gated = F.gelu(self.gate(hidden), approximate="tanh") * per_layer_input
        return self.norm(self.projection(gated))

    def bindings(self, prefix: str) -> list[Binding]:
        """Weights under the names of transformers' decoder layer."""
        drawn, quiet = Normal(self.text.initializer_range), branch_norm(self.text.num_hidden_layers)
        return [
            bind_replicated(f"{prefix}per_layer_input_gate.weight", self.gate.weight, drawn),
            bind_replicated(f"{prefix}per_layer_projection.weight", self.projection.weight, drawn),
            bind_replicated(f"{prefix}post_per_layer_input_norm.weight", self.norm.weight, quiet),
        ]


def _linear(inputs: int, outputs: int, config: TransformerConfig, device: torch.device) -> ReplicatedLinear:
    """A linear that every tensor parallel rank applies to the tokens it holds."""
    return ReplicatedLinear(
        inputs, outputs, dtype=config.params_dtype, device=device, partial_gradient=config.sequence_parallel
    )

"""Vocabulary-parallel token embedding with a scale and a padding row, as both tables of Gemma 4 need it."""

import torch
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
from megatron.core.tensor_parallel.mappings import (
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.distributed import ProcessGroup

from mimo_gemma4.weights.bindings import Binding, GradientSum, Normal, bind_sharded
from mimo_gemma4.weights.main_gradients import look_up


class TokenEmbedding(VocabParallelEmbedding):
    """Rows of a table [vocabulary / tp (local), width], times sqrt(`scaled_by`).

    The factor is rounded to the table's dtype, as when the released models were trained. Looking up the row of
    `padding_id` gives it no gradient.
    """

    def __init__(
        self,
        vocabulary: int,
        width: int,
        *,
        scaled_by: int,
        padding_id: int,
        config: TransformerConfig,
        tp_group: ProcessGroup,
    ) -> None:
        """Allocate this rank's rows, uninitialised."""
        super().__init__(
            vocabulary,
            width,
            init_method=config.init_method,
            reduce_scatter_embeddings=config.sequence_parallel,
            config=config,
            tp_group=tp_group,
        )
        self.scale = torch.tensor(scaled_by**0.5, dtype=config.params_dtype, device="cpu").item()
        padding_row = padding_id - self.vocab_start_index
        self.padding_row = padding_row if 0 <= padding_row < self.num_embeddings_per_partition else None

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Scaled rows of ids [B, S/cp] (local) → [S/(cp*tp), B, width] (local); tp = 1 without sequence parallelism."""
        rows = ids.t() - self.vocab_start_index
        elsewhere = (rows < 0) | (rows >= self.num_embeddings_per_partition)
        # [S/cp, B] → [S/cp, B, width]
        embedded = look_up(self.weight, rows.masked_fill(elsewhere, 0), self.padding_row)
        if self.tp_group.size() > 1:
            embedded = embedded.masked_fill(elsewhere.unsqueeze(-1), 0.0)
            if self.reduce_scatter_embeddings:
                embedded = reduce_scatter_to_sequence_parallel_region(embedded, group=self.tp_group)
            else:
                embedded = reduce_from_tensor_model_parallel_region(embedded, group=self.tp_group)
        return embedded * self.scale

    def bindings(self, name: str, gradient_sum: tuple[GradientSum, ...] = ()) -> list[Binding]:
        """This rank's rows under the Hugging Face name of the table."""
        drawn = Normal(self.config.init_method_std)
        return [bind_sharded(name, self.weight, 0, self.tp_group, drawn, gradient_sum=gradient_sum)]

"""Parameters that every tensor-parallel rank holds whole."""

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from mimo_gemma4.weights.bindings import GradientSum


def sum_over_token_shares(config: TransformerConfig) -> tuple[GradientSum, ...]:
    """`Binding.gradient_sum` of a parameter that every tensor-parallel rank applies to all tokens that it holds.

    Under sequence parallelism the ranks hold different tokens; else they hold the same and compute equal gradients.
    """
    return ("tp",) if config.sequence_parallel else ()


class OneHeadLinear(nn.Linear):
    """A replicated linear with `projections` times `heads` heads of outputs, of which a rank computes one of each.

    Its gradient is the sum over tensor-parallel ranks.
    """

    def __init__(
        self,
        inputs: int,
        projections: int,
        heads: int,
        head_dim: int,
        *,
        head: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Allocate the weight [projections * heads * head_dim, inputs]; this rank computes head number `head`."""
        super().__init__(inputs, projections * heads * head_dim, bias=False, dtype=dtype, device=device)
        self.shape, self.head = (projections, heads, head_dim), head

    def local_rows(self, whole: torch.Tensor) -> torch.Tensor:
        """Of [projections * heads * head_dim, ...] the rows of this rank's head, [projections * head_dim, ...]."""
        return whole.unflatten(0, self.shape)[:, self.head].flatten(0, 1)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """[..., inputs] → [..., projections * head_dim]."""
        return F.linear(inputs, self.local_rows(self.weight))

"""RMSNorm as Gemma 4 has it: in fp32, times the plain weight, then rounded once."""

import torch
import torch.nn.functional as F
from torch import nn

from mimo_gemma4.language.replicated import replicated_parameter


class RMSNorm(nn.Module):
    """Root-mean-square normalisation of the last dimension, whose size is `size`.

    `partial_gradient`: tensor parallel ranks each see only a part of the tokens or heads (see `replicated_parameter`).
    """

    def __init__(
        self, size: int, epsilon: float, *, dtype: torch.dtype, device: torch.device, partial_gradient: bool
    ) -> None:
        """Allocate the weight, all ones."""
        super().__init__()
        self.epsilon = epsilon
        ones = torch.ones(size, dtype=dtype, device=device)
        self.weight = replicated_parameter(ones, partial_gradient=partial_gradient)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Normalise [..., size]."""
        return F.rms_norm(states, self.weight.shape, self.weight, self.epsilon)


def normalise(states: torch.Tensor, epsilon: float) -> torch.Tensor:
    """RMSNorm of the last dimension without a weight."""
    return F.rms_norm(states, states.shape[-1:], None, epsilon)

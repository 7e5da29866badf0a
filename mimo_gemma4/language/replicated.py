"""Parameters that every tensor parallel rank holds whole, and the mark on those whose gradient is then only partial."""

import torch
from torch import nn


def replicated_parameter(values: torch.Tensor, *, partial_gradient: bool) -> nn.Parameter:
    """A parameter equal on all tensor parallel ranks.

    With `partial_gradient`, each rank sees only a part of the tokens or heads that the parameter is applied to:
    `tp_gradient_partial = True` tells the optimizer to sum its gradient over the ranks.
    """
    parameter = nn.Parameter(values)
    if partial_gradient:
        parameter.tp_gradient_partial = True  # type: ignore[attr-defined]
    return parameter

"""Parameters that every tensor parallel rank holds whole, and the mark on those whose gradient is then only partial."""

import torch
import torch.nn.functional as F
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


class ReplicatedLinear(nn.Linear):
    """A linear without bias whose weight [outputs, inputs] is whole on every tensor parallel rank.

    `partial_gradient`: ranks each apply it to a part of the tokens or heads (see `replicated_parameter`).
    """

    def __init__(
        self, inputs: int, outputs: int, *, dtype: torch.dtype, device: torch.device, partial_gradient: bool
    ) -> None:
        """Allocate the weight."""
        super().__init__(inputs, outputs, bias=False, dtype=dtype, device=device)
        self.weight = replicated_parameter(self.weight.detach(), partial_gradient=partial_gradient)


class OneHeadLinear(ReplicatedLinear):
    """A replicated linear with `projections` times `heads` heads of outputs, of which a rank computes one of each."""

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
        outputs = projections * heads * head_dim
        super().__init__(inputs, outputs, dtype=dtype, device=device, partial_gradient=True)
        self.shape, self.head = (projections, heads, head_dim), head

    def local_rows(self, whole: torch.Tensor) -> torch.Tensor:
        """Of [projections * heads * head_dim, ...] the rows of this rank's head, [projections * head_dim, ...]."""
        return whole.unflatten(0, self.shape)[:, self.head].flatten(0, 1)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """[..., inputs] → [..., projections * head_dim]."""
        return F.linear(inputs, self.local_rows(self.weight))

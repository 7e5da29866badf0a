"""A column-parallel product in two parts, so that the first can be sent while the second is computed."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F


def project_first(
    hidden: torch.Tensor, weight: torch.Tensor, group: dist.ProcessGroup, *, sequence_parallel: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The product with the first rows of a column-parallel weight, and the input of the product with the others.

    Over tensor-parallel ranks the input is gathered once, here, and its gradient is summed once, after both products'
    backward passes and while this one's weight gradient is computed.

    Under sequence parallelism the whole input is kept for the backward pass. megatron-core's linears instead keep
    their rank's share, (tp - 1)/tp * S/cp * B * H elements less per layer, and gather the input again.

    Args:
        hidden: [S/(cp*tp), B, H] (local) under sequence parallelism, else [S/cp, B, H] (local), equal on all ranks of
            `group`.
        weight: [rows (local), H].
        group: the tensor-parallel group.
        sequence_parallel: how `hidden` is cut.

    Returns:
        The product [S/cp, B, rows (local)], and `hidden` whole, [S/cp, B, H]: its gradient is each rank's part.
    """
    return _ProjectFirst.apply(hidden, weight, group, sequence_parallel and group.size() > 1)


class _ProjectFirst(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, group: dist.ProcessGroup, gathers: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if gathers:
            whole = hidden.new_empty(hidden.shape[0] * group.size(), *hidden.shape[1:])
            dist.all_gather_into_tensor(whole, hidden.contiguous(), group=group)
        else:
            whole = hidden.view_as(hidden)
        ctx.group, ctx.gathers = group, gathers
        ctx.save_for_backward(whole if ctx.needs_input_grad[1] else None, weight)
        return F.linear(whole, weight), whole

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        whole, weight = ctx.saved_tensors
        of_product, of_whole = (gradient.flatten(0, -2) for gradient in gradients)
        of_input = torch.addmm(of_whole, of_product, weight).view_as(gradients[1])
        of_input, work = _sum_over_ranks(of_input, ctx.group, ctx.gathers)
        of_weight = None
        if ctx.needs_input_grad[1]:
            of_weight = of_product.t() @ whole.flatten(0, -2)
        if work is not None:
            work.wait()
        return of_input, of_weight, None, None


def _sum_over_ranks(
    parts: torch.Tensor, group: dist.ProcessGroup, scatters: bool
) -> tuple[torch.Tensor, dist.Work | None]:
    """Launch the sum of all ranks' `parts` [S/cp, B, H]: its output, whole or this rank's share, and its handle."""
    if scatters:
        share = parts.new_empty(parts.shape[0] // group.size(), *parts.shape[1:])
        return share, dist.reduce_scatter_tensor(share, parts, group=group, async_op=True)
    if group.size() > 1:
        return parts, dist.all_reduce(parts, group=group, async_op=True)
    return parts, None

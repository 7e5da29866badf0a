"""Linears and norms of Gemma 4's vision and audio towers."""

from typing import Any, Literal

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from mimo_gemma4.distributed.megatron_config import module_config
from mimo_gemma4.weights.bindings import Binding, Normal, bind_replicated, bind_sharded

CLIP_BOUNDS = {
    "input_min": -float("inf"),
    "input_max": float("inf"),
    "output_min": -float("inf"),
    "output_max": float("inf"),
}


def tower_config(tp: int, dtype: torch.dtype, **sizes: Any) -> TransformerConfig:
    """megatron-core's configuration of a Gemma 4 tower; `sizes` are its other fields."""
    return module_config(
        tp,
        dtype,
        normalization="RMSNorm",
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        **sizes,
    )


class ClippableLinear(nn.Module):
    """Tensor-parallel linear without bias that clamps inputs and outputs if the model has bounds for them."""

    input_min: Tensor
    input_max: Tensor
    output_min: Tensor
    output_max: Tensor

    def __init__(
        self,
        cut: Literal["column", "row"],
        inputs: int,
        outputs: int,
        config: TransformerConfig,
        tp_group: ProcessGroup,
        *,
        clipped: bool,
    ):
        """Allocate the local weight and, where `clipped`, the four bounds (infinite until loaded)."""
        super().__init__()
        self.cut, self.tp_group, self.clipped = cut, tp_group, clipped
        common = {"config": config, "init_method": None, "bias": False, "tp_group": tp_group}
        if cut == "column":  # the caller reduces the input's gradient, once for all linears that read the input
            self.linear = ColumnParallelLinear(inputs, outputs, gather_output=False, disable_grad_reduce=True, **common)
        else:
            self.linear = RowParallelLinear(inputs, outputs, input_is_parallel=True, skip_bias_add=False, **common)
        if clipped:
            for name, bound in CLIP_BOUNDS.items():
                self.register_buffer(name, torch.tensor(bound, dtype=config.params_dtype))

    def forward(self, inputs: Tensor) -> Tensor:
        """[P, inputs (local if cut by row)] → [P, outputs (local if cut by column)]."""
        if self.clipped:
            inputs = torch.clamp(inputs, self.input_min, self.input_max)
        outputs = self.linear(inputs)[0]  # if cut by row, already summed over the tensor-parallel group
        return torch.clamp(outputs, self.output_min, self.output_max) if self.clipped else outputs

    def bindings(self, prefix: str, drawn: Normal) -> list[Binding]:
        """The weight and the bounds."""
        dim = 0 if self.cut == "column" else 1
        bindings = [bind_sharded(f"{prefix}linear.weight", self.linear.weight, dim, self.tp_group, drawn)]
        if self.clipped:
            bindings += [bind_replicated(f"{prefix}{name}", getattr(self, name), None) for name in CLIP_BOUNDS]
        return bindings


class RMSNorm(nn.Module):
    """Root mean square norm with weight, computed in fp32 and cast once at the end."""

    def __init__(self, size: int, eps: float, dtype: torch.dtype):
        """Allocate the weight."""
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype))

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., size] → [..., size]."""
        return F.rms_norm(hidden, self.weight.shape, self.weight, self.eps)

"""Gated feed-forward network: down(gelu(gate(x)) * up(x)), with gate and up fused."""

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn
from torch.distributed import ProcessGroup

from mimo_gemma4.language.kernels.elementwise import gated_gelu
from mimo_gemma4.weights.bindings import Binding, Normal, bind_sharded


class GatedMLP(nn.Module):
    """Feed-forward network of width `intermediate_size`; each rank's fused weight is [its gate rows; its up rows]."""

    def __init__(self, intermediate_size: int, config: TransformerConfig, tp_group: ProcessGroup) -> None:
        """Allocate this rank's weights, uninitialised."""
        super().__init__()
        self.config, self.tp_group = config, tp_group
        self.size = intermediate_size // tp_group.size()
        shared = {"config": config, "init_method": config.init_method, "bias": False, "tp_group": tp_group}
        self.linear_fc1 = ColumnParallelLinear(config.hidden_size, 2 * intermediate_size, **shared)
        self.linear_fc2 = RowParallelLinear(
            intermediate_size, config.hidden_size, input_is_parallel=True, skip_bias_add=False, **shared
        )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[S/(cp*tp), B, H] (local) → the same shape."""
        return self.linear_fc2(gated_gelu(self.linear_fc1(hidden)[0]))[0]

    def bindings(self, prefix: str) -> list[Binding]:
        """Weights under `prefix` + `gate_proj.weight`, `up_proj.weight` and `down_proj.weight`."""
        drawn, group, fused = Normal(self.config.init_method_std), self.tp_group, self.linear_fc1.weight
        return [
            bind_sharded(f"{prefix}gate_proj.weight", fused, 0, group, drawn, at=slice(0, self.size)),
            bind_sharded(f"{prefix}up_proj.weight", fused, 0, group, drawn, at=slice(self.size, 2 * self.size)),
            bind_sharded(f"{prefix}down_proj.weight", self.linear_fc2.weight, 1, group, drawn),
        ]

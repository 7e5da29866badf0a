"""A small tensor-parallel module with bindings, its one-process reference, and small grids to put it on."""

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from mimo_gemma4.distributed.layout import Layout, ModuleGrid
from mimo_gemma4.distributed.platform import create_platform
from mimo_gemma4.distributed.process_groups import ProcessGroups, create_process_groups
from mimo_gemma4.weights.bindings import Binding, Normal, initialise

HIDDEN, HEADS, HEAD_SIZE = 6, 4, 3
INNER = HEADS * HEAD_SIZE
SHAPES = {"norm": (HIDDEN,), "up": (INNER, HIDDEN), "head_norm": (HEAD_SIZE,), "down": (HIDDEN, INNER), "gain": (1,)}
TRAINABLE = ("norm", "up", "head_norm", "down")


Grids = dict[str, tuple[tuple[int, ...], int]]
"""Module → (ranks, tensor-parallel size)."""


def toy_layout(grids: Grids, world_size: int) -> Layout:
    """A layout of grids with tensor and data parallelism."""
    modules = {
        name: ModuleGrid(name, ranks, tp=tp, cp=1, dp=len(ranks) // tp, pp=1, ep=1, sequence_parallel=False)
        for name, (ranks, tp) in grids.items()
    }
    return Layout(modules, world_size, "disjoint")


def toy_world(grids: Grids) -> tuple[Layout, ProcessGroups]:
    """The layout and its process groups on a rank that has joined the others."""
    platform = create_platform()
    layout = toy_layout(grids, dist.get_world_size())
    return layout, create_process_groups(layout, platform)


class ToyModule(nn.Module):
    """norm → column-parallel → norm over local heads → tanh → row-parallel; the buffer `gain` scales the output."""

    def __init__(self, prefix: str, tp_group: dist.ProcessGroup, dtype: torch.dtype = torch.float32, seed: int = 7):
        super().__init__()
        tp, self.tp_group, self.prefix = tp_group.size(), tp_group, prefix
        self.config = TransformerConfig(
            num_layers=1,
            hidden_size=HIDDEN,
            num_attention_heads=HEADS,
            use_cpu_initialization=True,
            calculate_per_token_loss=True,
        )
        self.norm = nn.Parameter(torch.empty(HIDDEN, dtype=dtype))
        self.up = nn.Parameter(torch.empty(INNER // tp, HIDDEN, dtype=dtype))
        self.head_norm = nn.Parameter(torch.empty(HEAD_SIZE, dtype=dtype))
        self.down = nn.Parameter(torch.empty(HIDDEN, INNER // tp, dtype=dtype))
        self.register_buffer("gain", torch.empty(1, dtype=dtype))
        initialise(self.bindings(), seed)

    def forward(self, x: Tensor) -> Tensor:
        """[B, HIDDEN] → [B, HIDDEN]."""
        inner = copy_to_tensor_model_parallel_region(x * self.norm, self.tp_group) @ self.up.T
        inner = torch.tanh(inner.unflatten(-1, (-1, HEAD_SIZE)) * self.head_norm).flatten(-2)
        return reduce_from_tensor_model_parallel_region(inner @ self.down.T, self.tp_group) * self.gain

    def bindings(self) -> list[Binding]:
        tp, rank = self.tp_group.size(), self.tp_group.rank()
        cuts = {"up": 0, "down": 1}
        bindings = []
        for name, shape in SHAPES.items():
            index = [slice(0, size) for size in shape]
            if name in cuts:
                part = shape[cuts[name]] // tp
                index[cuts[name]] = slice(rank * part, (rank + 1) * part)
            tensor = getattr(self, name)
            region = tuple(slice(0, size) for size in tensor.shape)
            sums = ("tp",) if name == "head_norm" else ()
            bindings.append(Binding(f"{self.prefix}.{name}", shape, tuple(index), tensor, region, Normal(0.5), sums))
        return bindings


def reference_forward(weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """The same computation on whole weights, without any parallelism."""
    inner = ((x * weights["norm"]) @ weights["up"].T).unflatten(-1, (HEADS, HEAD_SIZE)) * weights["head_norm"]
    return (torch.tanh(inner).flatten(-2) @ weights["down"].T) * weights["gain"]


def reference_weights(prefix: str, seed: int = 7) -> dict[str, Tensor]:
    """Whole initial weights, by short name."""
    weights = {name: torch.empty(shape) for name, shape in SHAPES.items()}
    whole = {name: tuple(slice(0, size) for size in shape) for name, shape in SHAPES.items()}
    initialise([Binding(f"{prefix}.{n}", SHAPES[n], whole[n], weights[n], whole[n], Normal(0.5)) for n in SHAPES], seed)
    return weights


def loss(output: Tensor) -> Tensor:
    """Summed loss of a batch; each sample stands for one token."""
    return (output - 1.0).square().sum()


def samples(step: int, salt: int, count: int = 5) -> Tensor:
    """[count, HIDDEN]: the global batch of a step."""
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(100 * step + salt))

"""In bf16 on a GPU, at real size, the vision encoders are as near to transformers' fp32 as its own bf16 is.

pytest -m gpu tests/gpu/encoders/test_vision_bf16_band.py
"""

import copy

import pytest
import torch
import torch.distributed as dist
import yaml
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import nn
from transformers.models.gemma4.configuration_gemma4 import Gemma4TextConfig, Gemma4VisionConfig
from transformers.models.gemma4.modeling_gemma4 import Gemma4MultimodalEmbedder, Gemma4VisionModel
from transformers.models.gemma4_unified.configuration_gemma4_unified import (
    Gemma4UnifiedTextConfig,
    Gemma4UnifiedVisionConfig,
)
from transformers.models.gemma4_unified.modeling_gemma4_unified import Gemma4UnifiedVisionEmbedder

from mimo_gemma4.distributed.module_context import ModuleContext
from mimo_gemma4.encoders.registry import build_encoder, build_processor
from mimo_gemma4.weights.bindings import load
from tests import REPOSITORY
from tests.unit.encoders.test_unified_matches_transformers import file_name

pytestmark = pytest.mark.gpu
GRIDS = [(19, 14), (16, 16), (22, 12), (3, 80), (19, 14), (1, 1)]
"""Soft tokens across and down, as of photographs, and two extremes."""
MARGIN = 1.05
"""Two bf16 runs round independently: their errors have the same size, but not to the last percent."""


@pytest.fixture(scope="module", autouse=True)
def one_rank():
    """A world of one, in this process: encoders take a tensor-parallel group."""
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=torch.device("cuda", 0))
    yield
    dist.destroy_process_group()


class Tower(nn.Module):
    """transformers' tower and projector under the names of the whole model."""

    def __init__(self, hf_config: dict):
        super().__init__()
        vision = Gemma4VisionConfig(**hf_config["vision_config"], attn_implementation="sdpa")
        self.vision_tower = Gemma4VisionModel(vision)
        text = Gemma4TextConfig(hidden_size=hf_config["text_config"]["hidden_size"])
        self.embed_vision = Gemma4MultimodalEmbedder(vision, text)

    @staticmethod
    def file_name(name: str) -> str:
        return f"model.{name}"

    def forward(self, pixels: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return self.embed_vision(self.vision_tower(pixels, positions).last_hidden_state)


class Embedder(nn.Module):
    """transformers' 12B embedder under the names of the whole model."""

    def __init__(self, hf_config: dict):
        super().__init__()
        vision = Gemma4UnifiedVisionConfig(**hf_config["vision_config"])
        text = Gemma4UnifiedTextConfig(hidden_size=hf_config["text_config"]["hidden_size"])
        self.embed_vision = Gemma4UnifiedVisionEmbedder(vision, text)

    file_name = staticmethod(file_name)

    def forward(self, pixels: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        soft_tokens = self.embed_vision(pixels, positions).pooler_output
        return soft_tokens[(positions >= 0).all(dim=-1)]


@torch.no_grad()
def randomise(reference: nn.Module) -> None:
    """Weights as of a trained model: branches add up to unit size, some activations are clipped, all fit bf16."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in reference.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator).to(tensor.device)
        if name.endswith(("_min", "_max")):
            tensor.fill_(3.0 if name.endswith("max") else -3.0)
        elif name.endswith(("q_norm.weight", "k_norm.weight")):
            tensor.copy_((1 + 0.1 * noise) * tensor.numel() ** -0.25)
        elif "norm" in name or name.endswith(("std_scale", "ln1.weight", "ln2.weight")):
            tensor.copy_(1 + 0.1 * noise if "bias" not in name else 0.1 * noise)
        elif "embedding" in name and "projection" not in name:
            tensor.copy_(0.1 * noise)
        else:
            tensor.copy_(noise / tensor.shape[-1] ** 0.5)
        tensor.copy_(tensor.bfloat16())


class StateSource:
    def __init__(self, module: nn.Module):
        self.state = {module.file_name(name): tensor for name, tensor in module.state_dict().items()}

    def read(self, name, index, shape):  # noqa: ANN001, ANN201
        return self.state[name][index]


def run(module: nn.Module, *inputs: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    soft_tokens = module(*inputs)
    cotangent = torch.randn(soft_tokens.shape, generator=torch.Generator().manual_seed(1)).to(soft_tokens)
    (soft_tokens * cotangent).sum().backward()
    gradients = {module.file_name(name): p.grad.float() for name, p in module.named_parameters()}
    return soft_tokens.detach().float(), gradients


@pytest.mark.parametrize(
    ("preset", "kind"), [("gemma4_e4b", Tower), ("gemma4_31b", Tower), ("gemma4_12b", Embedder)], ids=str
)
def test_band(preset: str, kind: type):
    hf_config = yaml.safe_load((REPOSITORY / f"configs/model/{preset}.yaml").read_text())
    processor, device = build_processor("vision", hf_config), torch.device("cuda", 0)
    with device:
        reference = kind(hf_config)
    randomise(reference)
    per_row = processor.pooling_kernel_size**2
    items = [
        {
            "pixel_values": torch.rand(x * y * per_row, 3 * processor.patch_size**2),
            "grid": torch.tensor([x, y]),
        }
        for x, y in GRIDS
    ]
    padded = [tensor.to(device) for tensor in processor.transformers_inputs(items).values()]
    rounded = copy.deepcopy(reference).bfloat16()
    expected, expected_gradients = run(reference, *padded)
    theirs, their_gradients = run(rounded, *padded)

    context = ModuleContext(
        ProcessGroupCollection(tp=dist.group.WORLD),
        language_hidden=hf_config["text_config"]["hidden_size"],
        dtype=torch.bfloat16,
        device=device,
    )
    encoder = build_encoder("vision", hf_config, context)
    load(encoder.bindings(), StateSource(rounded), "reference")
    inputs = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in processor.collate(items).items()}
    ours = encoder(**inputs)
    cotangent = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1)).to(ours)
    (ours * cotangent).sum().backward()

    error, band = (ours.float() - expected).norm(), (theirs - expected).norm()
    print(f"{preset}: soft tokens off by {error / expected.norm():.2e}, transformers' by {band / expected.norm():.2e}")
    assert error <= MARGIN * band
    ours_squared, theirs_squared = torch.zeros((), device=device), torch.zeros((), device=device)
    for binding in encoder.bindings():
        if isinstance(binding.tensor, nn.Parameter):
            truth = expected_gradients[binding.name]
            ours_squared += ((binding.tensor.grad.float() - truth).norm() / truth.norm()) ** 2
            theirs_squared += ((their_gradients[binding.name] - truth).norm() / truth.norm()) ** 2
    print(f"{preset}: gradients {ours_squared.sqrt():.2e}, transformers' {theirs_squared.sqrt():.2e}")
    assert ours_squared <= MARGIN**2 * theirs_squared

"""The vision encoder's rows and every gradient equal those of transformers, for both kinds of Gemma 4 tower."""

import pytest
import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import nn
from transformers.models.gemma4.configuration_gemma4 import Gemma4TextConfig
from transformers.models.gemma4.configuration_gemma4 import Gemma4VisionConfig as ReferenceConfig
from transformers.models.gemma4.modeling_gemma4 import Gemma4MultimodalEmbedder, Gemma4VisionModel

from encoders.base import Encoder
from encoders.registry import build_encoder, build_processor
from mimo_gemma4.weights import load

LANGUAGE_HIDDEN = 24
VARIANTS = {
    "clipped": dict(num_attention_heads=4, num_key_value_heads=4, head_dim=16, use_clipped_linears=True),
    "standardized": dict(num_attention_heads=4, num_key_value_heads=2, head_dim=12, standardize=True),
}
COMMON = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, patch_size=4, position_embedding_size=64)
GRIDS = [(2, 1), (1, 1), (3, 2), (2, 1), (1, 4), (1, 2)]  # soft tokens across and down: ragged, with repeats, unsorted


@pytest.fixture(scope="module", autouse=True)
def one_rank():
    """A world of one, in this process: megatron-core's linears want a process group."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Reference(nn.Module):
    """transformers' tower and projector under the names of the whole model."""

    def __init__(self, variant: str, attention: str):
        super().__init__()
        config = ReferenceConfig(**COMMON, **VARIANTS[variant], attn_implementation=attention)
        self.vision_tower = Gemma4VisionModel(config)
        self.embed_vision = Gemma4MultimodalEmbedder(config, Gemma4TextConfig(hidden_size=LANGUAGE_HIDDEN))

    def randomise(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        head_dim = self.vision_tower.config.head_dim
        for name, tensor in self.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith(("_min", "_max")):  # bounds that many of the roughly unit-sized activations exceed
                tensor.copy_((1 + 0.2 * noise.abs()) * (1 if name.endswith("max") else -1))
            elif name.endswith(("norm.weight", "std_scale")):
                tensor.copy_(1 + 0.2 * noise)
            else:
                tensor.copy_(noise / tensor.shape[-1] ** 0.5)
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                tensor.mul_(head_dim**-0.25)  # scores of unit size: attention with scale 1 is ill-conditioned otherwise

    def forward(self, items: list[dict[str, torch.Tensor]], processor) -> torch.Tensor:
        patches = max(item["pixel_values"].shape[0] for item in items)
        pixels = torch.zeros(len(items), patches, items[0]["pixel_values"].shape[1])
        positions = torch.full((len(items), patches, 2), -1)
        for i, item in enumerate(items):
            inputs = processor.collate([item])
            pixels[i, : inputs["lengths"][0]] = inputs["pixel_values"]
            positions[i, : inputs["lengths"][0]] = inputs["positions"]
        return self.embed_vision(self.vision_tower(pixels, positions).last_hidden_state)


class StateSource:
    def __init__(self, module: nn.Module):
        self.state = module.state_dict()

    def read(self, name, index, shape):
        tensor = self.state[name.removeprefix("model.")]
        assert tuple(tensor.shape) == shape
        return tensor[index]


def hf_config(variant: str) -> dict:
    return {
        "vision_config": {"model_type": "gemma4_vision", **COMMON, **VARIANTS[variant]},
        "vision_processor": {"max_soft_tokens": 8},
    }


def build(variant: str, activation_checkpointing: str = "none") -> Encoder:
    return build_encoder(
        "vision",
        hf_config(variant),
        ProcessGroupCollection(tp=dist.group.WORLD),
        language_hidden=LANGUAGE_HIDDEN,
        dtype=torch.float32,
        device=torch.device("cpu"),
        activation_checkpointing=activation_checkpointing,
    )


def gradients(
    variant: str, attention: str, items, processor
) -> tuple[Reference, torch.Tensor, dict[str, torch.Tensor]]:
    reference = Reference(variant, attention)
    reference.randomise(seed=0)
    rows = reference(items, processor)
    (rows * cotangent(rows)).sum().backward()
    return reference, rows, {f"model.{name}": p.grad for name, p in reference.named_parameters()}


def cotangent(rows: torch.Tensor) -> torch.Tensor:
    return torch.randn(rows.shape, generator=torch.Generator().manual_seed(1))


def random_items() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [
        {"pixel_values": torch.rand(9 * x * y, 48, generator=generator), "grid": torch.tensor([x, y])} for x, y in GRIDS
    ]


@pytest.mark.parametrize("activation_checkpointing", ["none", "full"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_and_gradients_equal_transformers(variant: str, activation_checkpointing: str):
    processor, items = build_processor("vision", hf_config(variant)), random_items()
    reference, expected, expected_gradients = gradients(variant, "eager", items, processor)
    _, other_rows, other_gradients = gradients(variant, "sdpa", items, processor)

    encoder = build(variant, activation_checkpointing)
    load(encoder.bindings(), StateSource(reference), "reference")
    rows = encoder(**processor.collate(items))
    (rows * cotangent(rows)).sum().backward()

    # fp32 sums of a few hundred terms in another order: 1e-5, or 4 times what eager against SDPA attention differs by.
    assert_close(rows, expected, max(1e-5 * expected.norm(), 4 * (expected - other_rows).norm()), "rows")
    total = torch.stack([g.norm() for g in expected_gradients.values()]).norm()
    compared = set()
    for binding in encoder.bindings():
        if isinstance(binding.tensor, nn.Parameter):
            expected, other = expected_gradients[binding.name], other_gradients[binding.name]
            tolerance = max(1e-5 * expected.norm() + 1e-7 * total, 4 * (expected - other).norm())
            assert_close(binding.view(binding.tensor.grad), expected[binding.index], tolerance, binding.name)
            compared.add(binding.name)
    assert compared == set(expected_gradients)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: torch.Tensor, name: str) -> None:
    deviation = (actual - expected).norm()
    assert deviation <= tolerance, f"{name}: differs by {deviation:.3e}, allowed {tolerance:.3e}"


@pytest.mark.parametrize("variant", VARIANTS)
def test_bindings_name_every_tensor_of_the_model_once(variant: str):
    encoder = build(variant)
    names = [binding.name for binding in encoder.bindings()]
    assert len(names) == len(set(names))
    assert set(names) == {f"model.{name}" for name in Reference(variant, "sdpa").state_dict()}
    bound = {id(binding.tensor) for binding in encoder.bindings()}
    assert bound == {id(tensor) for tensor in [*encoder.parameters(), *encoder.buffers()]}

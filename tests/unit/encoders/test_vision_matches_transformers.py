"""The vision encoder's soft tokens and every gradient equal those of transformers, for both kinds of Gemma 4 tower."""

import pytest
import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import nn

from mimo_gemma4.distributed.module_context import ModuleContext
from mimo_gemma4.encoders.base import Encoder
from mimo_gemma4.encoders.registry import build_encoder, build_processor
from mimo_gemma4.weights.bindings import load
from tests.state_source import StateSource
from tests.vision_reference import VisionReference

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


def hf_config(variant: str) -> dict:
    return {
        "vision_config": {"model_type": "gemma4_vision", **COMMON, **VARIANTS[variant]},
        "vision_processor": {"max_soft_tokens": 8},
    }


def build(variant: str, activation_checkpointing: str = "none") -> Encoder:
    context = ModuleContext(
        ProcessGroupCollection(tp=dist.group.WORLD),
        language_hidden=LANGUAGE_HIDDEN,
        dtype=torch.float32,
        device=torch.device("cpu"),
        activation_checkpointing=activation_checkpointing,
    )
    return build_encoder("vision", hf_config(variant), context)


def gradients(
    variant: str, attention: str, items, processor
) -> tuple[VisionReference, torch.Tensor, dict[str, torch.Tensor]]:
    reference = VisionReference(COMMON | VARIANTS[variant], LANGUAGE_HIDDEN, attention)
    reference.randomise(seed=0)
    soft_tokens = reference(items, processor)
    (soft_tokens * cotangent(soft_tokens)).sum().backward()
    return reference, soft_tokens, {f"model.{name}": p.grad for name, p in reference.named_parameters()}


def cotangent(soft_tokens: torch.Tensor) -> torch.Tensor:
    return torch.randn(soft_tokens.shape, generator=torch.Generator().manual_seed(1))


def random_items() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [
        {"pixel_values": torch.rand(9 * x * y, 48, generator=generator), "grid": torch.tensor([x, y])} for x, y in GRIDS
    ]


@pytest.mark.parametrize("activation_checkpointing", ["none", "full"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_soft_tokens_and_gradients_equal_transformers(variant: str, activation_checkpointing: str):
    processor, items = build_processor("vision", hf_config(variant)), random_items()
    reference, expected, expected_gradients = gradients(variant, "eager", items, processor)
    _, other, other_gradients = gradients(variant, "sdpa", items, processor)

    encoder = build(variant, activation_checkpointing)
    load(encoder.bindings(), StateSource(reference), "reference")
    soft_tokens = encoder(**processor.collate(items))
    (soft_tokens * cotangent(soft_tokens)).sum().backward()

    # fp32 sums of a few hundred terms in another order: 1e-5, or 4 times what eager against SDPA attention differs by.
    assert_close(soft_tokens, expected, max(1e-5 * expected.norm(), 4 * (expected - other).norm()), "soft tokens")
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
    reference = VisionReference(COMMON | VARIANTS[variant], LANGUAGE_HIDDEN)
    assert set(names) == {f"model.{name}" for name in reference.state_dict()}
    bound = {id(binding.tensor) for binding in encoder.bindings()}
    assert bound == {id(tensor) for tensor in [*encoder.parameters(), *encoder.buffers()]}

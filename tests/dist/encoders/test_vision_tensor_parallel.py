"""The vision encoder cut over 2 or 4 tensor-parallel ranks gives the soft tokens and gradients of one rank."""

import pytest
import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import nn

from mimo_gemma4.distributed.module_context import ModuleContext
from mimo_gemma4.encoders.base import Encoder
from mimo_gemma4.encoders.registry import build_encoder, build_processor
from mimo_gemma4.errors import LayoutError
from mimo_gemma4.weights.bindings import initialise
from mimo_gemma4.weights.freezing import freeze
from tests.dist.harness import run_ranks

VISION = dict(
    model_type="gemma4_vision",
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=8,
    patch_size=4,
    position_embedding_size=64,
    initializer_range=0.2,
)
CLIPPED = {"vision_config": VISION | {"use_clipped_linears": True}, "vision_processor": {"max_soft_tokens": 8}}
STANDARDIZED = {"vision_config": VISION | {"standardize": True}, "vision_processor": {"max_soft_tokens": 8}}


def build(hf_config: dict, group: dist.ProcessGroup) -> Encoder:
    context = ModuleContext(
        ProcessGroupCollection(tp=group),
        language_hidden=24,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    encoder = build_encoder("vision", hf_config, context)
    initialise(encoder.bindings(), seed=5)
    for name, buffer in encoder.named_buffers():
        if name.endswith(("_min", "_max")):  # tight enough that a clamp before the sum over ranks would show
            buffer.fill_(0.8 if name.endswith("max") else -0.8)
        elif name.endswith(("std_bias", "std_scale")):
            buffer.copy_(torch.linspace(0.5, 1.5, buffer.numel()))
    return encoder


def run(encoder: Encoder, inputs: dict) -> torch.Tensor:
    soft_tokens = encoder(**inputs)
    cotangent = torch.randn(soft_tokens.shape, generator=torch.Generator().manual_seed(3))
    (soft_tokens * cotangent).sum().backward()
    return soft_tokens


def compare_with_one_rank(rank: int, hf_config: dict, frozen: bool | str | list[str]) -> None:
    alone = [dist.new_group([r]) for r in range(dist.get_world_size())][rank]
    whole, cut = build(hf_config, alone), build(hf_config, dist.group.WORLD)
    processor = build_processor("vision", hf_config)
    generator = torch.Generator().manual_seed(2)
    items = [
        {"pixel_values": torch.rand(9 * x * y, 48, generator=generator), "grid": torch.tensor([x, y])}
        for x, y in [(2, 1), (1, 1), (2, 2), (1, 2)]
    ]
    freeze("vision", whole, frozen)
    freeze("vision", cut, frozen)
    expected, actual = run(whole, processor.collate(items)), run(cut, processor.collate(items))
    # fp32: sums cut into `world` parts and added in another order.
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)

    reference = {b.name: b.tensor.grad for b in whole.bindings()}
    total = torch.stack([g.norm() for g in reference.values() if g is not None]).norm()
    trained = set()
    for binding in cut.bindings():
        if reference[binding.name] is None:
            assert binding.tensor.grad is None, binding.name
            continue
        gradient, whole_gradient = binding.tensor.grad, reference[binding.name][binding.index]
        if "tp" in binding.gradient_sum:
            dist.all_reduce(gradient)
        deviation, allowed = (
            (binding.view(gradient) - whole_gradient).norm(),
            1e-5 * whole_gradient.norm() + 1e-7 * total,
        )
        assert deviation <= allowed, f"{binding.name}: {deviation:.3e} > {allowed:.3e}"
        trained.add(binding.name)
    if frozen == "tower":
        assert trained == {"model.embed_vision.embedding_projection.weight"}
    elif not frozen:
        assert len(trained) == sum(isinstance(b.tensor, nn.Parameter) for b in cut.bindings())
    else:
        assert trained and not any(name.endswith("_proj.linear.weight") for name in trained)


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("hf_config", [CLIPPED, STANDARDIZED], ids=["clipped", "standardized"])
def test_equal_to_one_rank(hf_config: dict, world_size: int):
    run_ranks(world_size, compare_with_one_rank, hf_config, False)


@pytest.mark.parametrize("frozen", ["tower", ["*_proj.linear.weight"]], ids=["tower", "patterns"])
def test_equal_to_one_rank_with_frozen_parameters(frozen: str | list[str]):
    run_ranks(2, compare_with_one_rank, CLIPPED, frozen)


def refuse_heads(rank: int) -> None:
    with pytest.raises(LayoutError, match=r"layout\.vision\.tp=3 does not divide vision_config.num_attention_heads=4"):
        build(CLIPPED, dist.group.WORLD)


def test_heads_that_do_not_divide_are_refused():
    run_ranks(3, refuse_heads)

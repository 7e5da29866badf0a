"""The audio encoder cut over 1, 2 or 4 tensor-parallel ranks gives the soft tokens and gradients of transformers."""

import pytest
import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from mimo_gemma4.config import LoraConfig
from mimo_gemma4.distributed.module_context import ModuleContext
from mimo_gemma4.encoders.base import Encoder
from mimo_gemma4.encoders.registry import build_encoder, build_processor
from mimo_gemma4.errors import ConfigError, LayoutError
from mimo_gemma4.weights.bindings import load
from mimo_gemma4.weights.freezing import freeze
from mimo_gemma4.weights.lora import attach
from tests.audio_reference import AudioReference
from tests.dist.harness import run_ranks
from tests.state_source import StateSource

LANGUAGE_HIDDEN = 24
AUDIO = dict(
    model_type="gemma4_audio",
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    subsampling_conv_channels=[128, 8],
    output_proj_dims=40,
    rms_norm_eps=1e-3,
    gradient_clipping=1.5,
)
FRAMES = [30, 5, 90, 1]


def build(group: dist.ProcessGroup) -> Encoder:
    context = ModuleContext(
        ProcessGroupCollection(tp=group),
        language_hidden=LANGUAGE_HIDDEN,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    return build_encoder("audio", {"audio_config": AUDIO}, context)


def compare_with_transformers(rank: int, frozen: bool | str | list[str]) -> None:
    reference = AudioReference(AUDIO, LANGUAGE_HIDDEN)
    reference.randomise(seed=5)
    generator = torch.Generator().manual_seed(2)
    features = [torch.randn(frames, 128, generator=generator) for frames in FRAMES]
    expected = reference(features)
    cotangent = torch.randn(expected.shape, generator=generator)
    (expected * cotangent).sum().backward()
    gradients = {f"model.{name}": parameter.grad for name, parameter in reference.named_parameters()}
    total = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()

    encoder = build(dist.group.WORLD)
    load(encoder.bindings(), StateSource(reference), "reference")
    freeze("audio", encoder, frozen)
    processor = build_processor("audio", {"audio_config": AUDIO})
    soft_tokens = encoder(**processor.collate([{"features": sound} for sound in features]))
    (soft_tokens * cotangent).sum().backward()

    # fp32: sums cut into as many parts as there are ranks, and added in another order.
    assert (soft_tokens - expected).norm() <= 1e-5 * expected.norm()
    trained = set()
    for binding in encoder.bindings():
        gradient = binding.tensor.grad
        if gradient is None:
            continue
        if "tp" in binding.gradient_sum:
            dist.all_reduce(gradient)
        whole = gradients[binding.name]
        deviation = (binding.view(gradient) - whole[binding.index]).norm()
        allowed = 1e-5 * whole.norm() + 1e-7 * total
        assert deviation <= allowed, f"{binding.name}: {deviation:.3e} > {allowed:.3e}"
        trained.add(binding.name)
    if frozen == "tower":
        assert trained == {"model.embed_audio.embedding_projection.weight"}
    elif not frozen:
        assert trained == set(gradients)
    else:
        assert trained and not any("feed_forward" in name for name in trained)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_equal_to_transformers(world_size: int):
    run_ranks(world_size, compare_with_transformers, False)


@pytest.mark.parametrize("frozen", ["tower", ["*feed_forward*"]], ids=["tower", "patterns"])
def test_equal_to_transformers_with_frozen_parameters(frozen: str | list[str]):
    run_ranks(2, compare_with_transformers, frozen)


def refuse_adapters(rank: int) -> None:
    with pytest.raises(ConfigError, match=r"holds 2 pieces of '.*linear_start.linear', .* set layout.audio.tp to 1"):
        attach("audio", build(dist.group.WORLD), LoraConfig(targets=["*.lconv1d.*"]))


def test_adapters_on_a_linear_held_in_two_pieces_are_refused():
    run_ranks(2, refuse_adapters)


def refuse_heads(rank: int) -> None:
    with pytest.raises(LayoutError, match=r"layout\.audio\.tp=3 does not divide audio_config.num_attention_heads=4"):
        build(dist.group.WORLD)


def test_heads_that_do_not_divide_are_refused():
    run_ranks(3, refuse_heads)

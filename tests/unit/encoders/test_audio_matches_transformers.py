"""The audio encoder's soft tokens and gradients equal those of transformers, whatever else is in the pack."""

import pytest
import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mimo_gemma4.distributed.module_context import ModuleContext
from mimo_gemma4.encoders.base import Encoder
from mimo_gemma4.encoders.registry import build_encoder, build_processor
from mimo_gemma4.errors import ConfigError
from mimo_gemma4.media import MediaHeader
from mimo_gemma4.weights.bindings import load
from tests.audio_reference import AudioReference
from tests.state_source import StateSource

LANGUAGE_HIDDEN = 24
COMMON = dict(model_type="gemma4_audio", num_attention_heads=4, subsampling_conv_channels=[128, 8], output_proj_dims=40)
VARIANTS = {
    "clipped": dict(hidden_size=32, num_hidden_layers=2, use_clipped_linears=True),
    "short window": dict(
        hidden_size=24,
        num_hidden_layers=3,
        use_clipped_linears=False,
        attention_chunk_size=5,
        attention_context_left=6,
        attention_logit_cap=2.0,
        conv_kernel_size=3,
        residual_weight=0.25,
        gradient_clipping=0.9,
        rms_norm_eps=1e-3,
    ),
}
FRAMES = [99, 1, 7, 200, 2, 48, 3, 4, 5, 61]  # of every sound: every remainder of 4, some shorter than the window


@pytest.fixture(scope="module", autouse=True)
def one_rank():
    """A world of one, in this process: megatron-core's linears want a process group."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def hf_config(variant: str) -> dict:
    return {"audio_config": COMMON | VARIANTS[variant]}


def build(variant: str, activation_checkpointing: str = "none") -> Encoder:
    context = ModuleContext(
        ProcessGroupCollection(tp=dist.group.WORLD),
        language_hidden=LANGUAGE_HIDDEN,
        dtype=torch.float32,
        device=torch.device("cpu"),
        activation_checkpointing=activation_checkpointing,
    )
    return build_encoder("audio", hf_config(variant), context)


def loaded(variant: str, reference: AudioReference, activation_checkpointing: str = "none") -> Encoder:
    encoder = build(variant, activation_checkpointing)
    load(encoder.bindings(), StateSource(reference), "reference")
    return encoder


def random_reference(variant: str) -> AudioReference:
    reference = AudioReference(COMMON | VARIANTS[variant], LANGUAGE_HIDDEN)
    reference.randomise(seed=0)
    return reference


def random_features() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(frames, 128, generator=generator) for frames in FRAMES]


def cotangent(soft_tokens: torch.Tensor) -> torch.Tensor:
    return torch.randn(soft_tokens.shape, generator=torch.Generator().manual_seed(1))


def encode(encoder: Encoder, variant: str, features: list[torch.Tensor]) -> torch.Tensor:
    return encoder(**build_processor("audio", hf_config(variant)).collate([{"features": f} for f in features]))


@pytest.mark.parametrize("activation_checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_soft_tokens_and_gradients_equal_transformers(variant: str, activation_checkpointing: str):
    reference, features = random_reference(variant), random_features()
    expected = reference(features)
    (expected * cotangent(expected)).sum().backward()
    gradients = {f"model.{name}": parameter.grad for name, parameter in reference.named_parameters()}

    encoder = loaded(variant, reference, activation_checkpointing)
    soft_tokens = encode(encoder, variant, features)
    (soft_tokens * cotangent(soft_tokens)).sum().backward()

    # fp32: the same operations, sums in another order.
    assert soft_tokens.shape == expected.shape
    assert (soft_tokens - expected).norm() <= 1e-5 * expected.norm()
    total = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    compared = set()
    for binding in encoder.bindings():
        if isinstance(binding.tensor, nn.Parameter):
            gradient = gradients[binding.name]
            deviation = (binding.view(binding.tensor.grad) - gradient[binding.index]).norm()
            allowed = 1e-5 * gradient[binding.index].norm() + 1e-7 * total
            assert deviation <= allowed, f"{binding.name}: differs by {deviation:.3e}, allowed {allowed:.3e}"
            compared.add(binding.name)
    assert compared == set(gradients)


@pytest.mark.parametrize("variant", VARIANTS)
def test_clip_bounds_matter(variant: str):
    """The comparison above would otherwise not see a missing clamp."""
    reference, features = random_reference(variant), random_features()
    expected = reference(features)
    for name, buffer in reference.named_buffers():
        if name.endswith(("_min", "_max")):
            buffer.fill_(float("inf") if name.endswith("max") else -float("inf"))
    for module in reference.modules():
        if hasattr(module, "gradient_clipping"):
            module.gradient_clipping = 1e10
    assert (reference(features) - expected).norm() > 1e-2 * expected.norm()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_sound_gives_the_same_soft_tokens_alone_and_among_others(variant: str):
    encoder, features = loaded(variant, random_reference(variant)), random_features()
    together = encode(encoder, variant, features)
    alone = torch.cat([encode(encoder, variant, [sound]) for sound in features])
    # fp32: matrix products of another height may add in another order.
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_bindings_cover_every_tensor_of_the_model_once(variant: str):
    encoder = build(variant)
    covered: dict[str, int] = {}
    shapes = {
        f"model.{name}": t.shape
        for name, t in AudioReference(hf_config(variant)["audio_config"], 24).state_dict().items()
    }
    for binding in encoder.bindings():
        assert binding.shape == tuple(shapes[binding.name])
        covered[binding.name] = covered.get(binding.name, 0) + binding.view().numel()
    assert covered == {name: shape.numel() for name, shape in shapes.items()}
    bound = {id(binding.tensor) for binding in encoder.bindings()}
    assert bound == {id(tensor) for tensor in [*encoder.parameters(), *encoder.buffers()]}


@pytest.mark.parametrize("variant", VARIANTS)
def test_flops_are_those_of_the_kernels(variant: str):
    """Attention, whose blocks also compute scores that are masked, is counted by hand."""
    encoder, frames = build(variant), 99
    for parameter in encoder.parameters():
        nn.init.zeros_(parameter)
    with FlopCounterMode(display=False) as counter:
        encode(encoder, variant, [torch.zeros(frames, 128)])
    kernels = counter.get_flop_counts()["Global"]
    audio, tokens = encoder.audio, 25
    window, width, layers = audio.attention_chunk_size, audio.hidden_size, audio.num_hidden_layers
    pairs = sum(min(token + 1, window) for token in range(tokens))
    relative_keys = 2 * window * width**2 * layers  # of 12 distances, however many soft tokens there are
    outside_attention = sum(count for kernel, count in kernels.items() if kernel is not torch.ops.aten.bmm)
    header = MediaHeader(samples=16_000, sample_rate=16_000)
    attention = 2 * 3 * pairs * width * layers  # scores by key and by distance, and weighted values
    assert encoder.flops([header]) == outside_attention - relative_keys + attention


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"subsampling_conv_channels": [16, 8]}, r"subsampling_conv_channels is \[16, 8\]; .* the first 128"),
        ({"hidden_size": 30}, "hidden_size=30 is not an even multiple of num_attention_heads=4"),
        ({"attention_context_left": 20}, "attention_context_left is 20; the Gemma 4 tower is built with 13"),
        ({"attention_context_right": 1}, "attention_context_right is 1; the Gemma 4 tower is built with 0"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'; the Gemma 4 tower is built with 'silu'"),
        ({"output_proj_dims": None}, "audio_config lacks output_proj_dims"),
    ],
)
def test_configurations_that_are_not_gemma_4_are_refused(options: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        build_processor("audio", {"audio_config": COMMON | VARIANTS["clipped"] | options})

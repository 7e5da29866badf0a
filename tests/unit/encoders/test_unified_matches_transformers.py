"""The embedders of Gemma 4 12B: soft tokens, gradients and processor outputs equal those of transformers."""

import io

import numpy as np
import pytest
import soundfile
import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from PIL import Image
from torch import nn
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil
from transformers.models.gemma4_unified.configuration_gemma4_unified import (
    Gemma4UnifiedAudioConfig,
    Gemma4UnifiedTextConfig,
    Gemma4UnifiedVisionConfig,
)
from transformers.models.gemma4_unified.feature_extraction_gemma4_unified import Gemma4UnifiedAudioFeatureExtractor
from transformers.models.gemma4_unified.modeling_gemma4_unified import (
    Gemma4UnifiedMultimodalEmbedder,
    Gemma4UnifiedVisionEmbedder,
)

from mimo_gemma4.distributed.module_context import ModuleContext
from mimo_gemma4.encoders.base import Encoder
from mimo_gemma4.encoders.registry import build_encoder, build_processor
from mimo_gemma4.errors import ConfigError
from mimo_gemma4.media import MediaHeader
from mimo_gemma4.weights.bindings import load

LANGUAGE_HIDDEN = 24
VISION = dict(patch_size=4, pooling_kernel_size=2, mm_embed_dim=32, output_proj_dims=32, mm_posemb_size=20)
AUDIO = dict(audio_embed_dim=16, output_proj_dims=16)
HF_CONFIG = {
    "vision_config": {"model_type": "gemma4_unified_vision", **VISION},
    "audio_config": {"model_type": "gemma4_unified_audio", **AUDIO},
    "vision_processor": {"max_soft_tokens": 12},
}
FULL_SIZE = {"vision_config": {"model_type": "gemma4_unified_vision"}, "audio_config": HF_CONFIG["audio_config"]}


@pytest.fixture(scope="module", autouse=True)
def one_rank():
    """A world of one, in this process: encoders take a tensor-parallel group."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def file_name(name: str) -> str:
    """The name of a parameter of transformers' model in the files that it saves."""
    projector = "embed_vision.multimodal_embedder."
    if name.startswith(projector):
        return f"model.embed_vision.{name.removeprefix(projector)}"
    return "model." + name.replace("embed_vision.", "vision_embedder.")


class Reference(nn.Module):
    """transformers' embedders under the names of the whole model, with random weights."""

    def __init__(self):
        super().__init__()
        text = Gemma4UnifiedTextConfig(hidden_size=LANGUAGE_HIDDEN)
        self.embed_vision = Gemma4UnifiedVisionEmbedder(Gemma4UnifiedVisionConfig(**VISION), text)
        self.embed_audio = Gemma4UnifiedMultimodalEmbedder(Gemma4UnifiedAudioConfig(**AUDIO), text)
        generator = torch.Generator().manual_seed(0)
        for name, parameter in self.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scaled = 1 + 0.2 * noise if "norm.weight" in name or ("ln" in name and "weight" in name) else 0.3 * noise
            parameter.data.copy_(scaled)

    def read(self, name, index, shape):
        tensor = {file_name(key): value for key, value in self.state_dict().items()}[name]
        assert tuple(tensor.shape) == shape
        return tensor[index]


def build(modality: str, reference: Reference) -> Encoder:
    context = ModuleContext(
        ProcessGroupCollection(tp=dist.group.WORLD),
        language_hidden=LANGUAGE_HIDDEN,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    encoder = build_encoder(modality, HF_CONFIG, context)
    load(encoder.bindings(), reference, "reference")
    assert {id(b.tensor) for b in encoder.bindings()} == {id(p) for p in encoder.parameters()}
    return encoder


def compare(encoder: Encoder, found: torch.Tensor, reference: Reference, expected: torch.Tensor, part: str) -> None:
    """Soft tokens, and the gradients of all parameters under `part`; fp32, the same operations in another order."""
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    cotangent = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    (found * cotangent).sum().backward()
    (expected * cotangent).sum().backward()
    gradients = {file_name(name): p.grad for name, p in reference.named_parameters() if name.startswith(part)}
    total = torch.stack([g.norm() for g in gradients.values()]).norm()
    assert {binding.name for binding in encoder.bindings()} == set(gradients)
    for binding in encoder.bindings():
        deviation = (binding.tensor.grad - gradients[binding.name]).norm()
        assert deviation <= 1e-5 * gradients[binding.name].norm() + 1e-7 * total, binding.name


def picture(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_image_soft_tokens_and_gradients():
    reference = Reference()
    encoder, processor = build("vision", reference), build_processor("vision", HF_CONFIG)
    items = [processor.decode(picture(*size)) for size in [(30, 20), (5, 90), (8, 8), (40, 12), (90, 5)]]
    pixels, positions = torch.zeros(len(items), 12, 192), torch.full((len(items), 12, 2), -1)
    for i, item in enumerate(items):
        inputs = processor.collate([item])
        pixels[i, : len(item["pixel_values"])] = inputs["pixel_values"]
        positions[i, : len(item["pixel_values"])] = inputs["positions"]
    expected = reference.embed_vision(pixels, positions).pooler_output[positions[..., 0] >= 0]
    compare(encoder, encoder(**processor.collate(items)), reference, expected, "embed_vision")


def test_sound_soft_tokens_and_gradients():
    reference = Reference()
    encoder, processor = build("audio", reference), build_processor("audio", HF_CONFIG)
    items = [processor.decode(sound(samples)) for samples in (1, 16, 17, 333)]
    inputs = processor.collate(items)
    expected = reference.embed_audio(inputs["waveforms"])
    compare(encoder, encoder(**inputs), reference, expected, "embed_audio")


@pytest.mark.parametrize("budget", [70, 140, 280, 560, 1120])
def test_squares_are_the_merged_patches_of_transformers(budget: int):
    """transformers merges k x k patches of the classic processor into one; its own resize needs torchvision."""
    processor = build_processor("vision", FULL_SIZE | {"vision_processor": {"max_soft_tokens": budget}})
    for width, height in [(640, 480), (17, 900), (1, 1), (383, 385), (4000, 1)]:
        classic = Gemma4ImageProcessorPil(max_soft_tokens=budget)(Image.open(io.BytesIO(picture(width, height))))
        count = classic["num_soft_tokens_per_image"][0]
        x, y = np.asarray(classic["image_position_ids"][0][: count * 9]).T
        across = (x.max() + 1) // 3
        patches = np.asarray(classic["pixel_values"][0][: count * 9]).reshape(-1, 16, 16, 3)
        expected = np.zeros((count, 48, 48, 3), np.float32)
        for patch, column, line in zip(patches, x, y, strict=True):
            row, top, left = line // 3 * across + column // 3, line % 3 * 16, column % 3 * 16
            expected[row, top : top + 16, left : left + 16] = patch
        inputs = processor.collate([processor.decode(picture(width, height))])
        assert processor.soft_tokens(MediaHeader(width=width, height=height)) == count == len(inputs["pixel_values"])
        np.testing.assert_allclose(inputs["pixel_values"].numpy(), expected.reshape(count, -1), rtol=0, atol=1e-6)
        places = torch.arange(count)
        assert torch.equal(inputs["positions"], torch.stack([places % across, places // across], dim=1))


def sound(samples: int, rate: int = 16_000, channels: int = 1) -> bytes:
    buffer = io.BytesIO()
    waves = np.random.default_rng(samples).uniform(-0.9, 0.9, (samples, channels))
    soundfile.write(buffer, waves, rate, "FLOAT", format="WAV")
    return buffer.getvalue()


def test_samples_equal_the_feature_extractor_of_transformers():
    processor = build_processor("audio", {"audio_config": {"model_type": "gemma4_unified_audio"}})
    lengths = [1, 639, 640, 641, 1600, 16_000, 30 * 16_000 - 1, 30 * 16_000]
    lengths += np.random.default_rng(0).integers(1, 100_000, 50).tolist()
    for samples in lengths:
        data = sound(samples)
        waveform, _ = soundfile.read(io.BytesIO(data), dtype="float32")
        expected = Gemma4UnifiedAudioFeatureExtractor()(waveform, return_tensors="np")
        item = processor.decode(data)
        np.testing.assert_array_equal(item["waveforms"].numpy(), expected["input_features"][0])
        header = MediaHeader(samples=samples, sample_rate=16_000)
        assert processor.soft_tokens(header) == expected["input_features_mask"].sum() == len(item["waveforms"])
        assert processor.placeholder(header)["waveforms"].shape == item["waveforms"].shape


@pytest.mark.parametrize(("samples", "rate"), [(4_410, 44_100), (7_999, 8_000), (31 * 8_000, 8_000), (1, 48_000)])
def test_soft_tokens_are_known_before_resampling(samples: int, rate: int):
    processor = build_processor("audio", {"audio_config": {"model_type": "gemma4_unified_audio"}})
    header = MediaHeader(samples=samples, sample_rate=rate)
    if samples == 1:
        with pytest.raises(ValueError, match="the sound is empty"):
            processor.decode(sound(samples, rate))
        return
    assert len(processor.decode(sound(samples, rate, channels=2))["waveforms"]) == processor.soft_tokens(header) <= 750


def test_configurations_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="vision_config.mm_posemb_size is 20"):
        build_processor("vision", HF_CONFIG | {"vision_processor": {"max_soft_tokens": 21}})
    wrong = {"vision_config": HF_CONFIG["vision_config"] | {"output_proj_dims": 7}}
    with pytest.raises(ConfigError, match="vision_config.output_proj_dims is 7, but mm_embed_dim is 32"):
        build_processor("vision", wrong)

"""SigLIP as an encoder: pixels, soft tokens and gradients equal transformers'; weights come from its own directory."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import SiglipConfig, SiglipImageProcessorPil, SiglipModel

from mimo_gemma4.config import Config, ModelConfig, load_config
from mimo_gemma4.config.presets import load_model_config
from mimo_gemma4.distributed.module_context import ModuleContext
from mimo_gemma4.encoders.registry import build_encoder, build_processor
from mimo_gemma4.encoders.siglip import SiglipEncoder
from mimo_gemma4.errors import CheckpointError, ConfigError
from mimo_gemma4.media import MediaHeader
from mimo_gemma4.train.initial_weights import check_own_directory, fill_from_own_directory

WIDTHS = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4)
TOWER = dict(**WIDTHS, num_hidden_layers=3, image_size=24, patch_size=8)
TEXT = dict(**WIDTHS, num_hidden_layers=1, vocab_size=8, bos_token_id=0, eos_token_id=1)
HIDDEN = 20


@pytest.fixture(scope="module", autouse=True)
def one_rank():
    """A world of one, in this process: encoders take a tensor-parallel group."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def siglip(tmp_path_factory) -> tuple[Path, SiglipModel]:
    """A random SigLIP with both towers, as such models are published, and its directory."""
    torch.manual_seed(0)
    model = SiglipModel(SiglipConfig(vision_config=TOWER, text_config=TEXT))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    folder = tmp_path_factory.mktemp("siglip")
    model.save_pretrained(folder)
    return folder, model


def configuration(folder: Path) -> tuple[Config, dict]:
    config = load_config(["config=vlm_siglip.yaml", f"modules.vision.hf_path={folder}"])
    return config, load_model_config(ModelConfig(preset="gemma4_tiny"), config.modules)


def build(folder: Path, activation_checkpointing: str = "none") -> SiglipEncoder:
    config, hf_config = configuration(folder)
    context = ModuleContext(
        ProcessGroupCollection(tp=dist.group.WORLD),
        language_hidden=HIDDEN,
        dtype=torch.float32,
        device=torch.device("cpu"),
        activation_checkpointing=activation_checkpointing,
    )
    encoder = build_encoder("vision", hf_config, context)
    fill_from_own_directory("vision", encoder, str(folder), config.run.seed, dist.group.WORLD)
    return encoder


def picture(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


FILES = [picture(*size) for size in [(24, 24), (100, 7), (1, 1), (33, 64)]]


@pytest.mark.parametrize("activation_checkpointing", ["none", "full"])
def test_soft_tokens_and_gradients(siglip: tuple[Path, SiglipModel], activation_checkpointing: str):
    folder, reference = siglip
    reference.zero_grad()
    encoder, processor = build(folder, activation_checkpointing), build_processor("vision", configuration(folder)[1])
    soft_tokens = encoder(**processor.collate([processor.decode(data) for data in FILES]))
    assert soft_tokens.shape == (sum(processor.soft_tokens(MediaHeader()) for _ in FILES), HIDDEN)

    preprocess = SiglipImageProcessorPil(size={"height": 24, "width": 24})
    pixels = preprocess([Image.open(io.BytesIO(data)) for data in FILES], return_tensors="pt")["pixel_values"]
    hidden = reference.vision_model(pixels).last_hidden_state
    first, _, second = encoder.projector
    weights = [p.detach().clone().requires_grad_() for p in (first.weight, first.bias, second.weight, second.bias)]
    expected = F.linear(F.gelu(F.linear(hidden.flatten(0, 1), *weights[:2])), *weights[2:])
    # fp32: pixels differ by one rounding, sums are in another order.
    torch.testing.assert_close(soft_tokens, expected, rtol=1e-5, atol=1e-5)

    cotangent = torch.randn(soft_tokens.shape, generator=torch.Generator().manual_seed(1))
    (soft_tokens * cotangent).sum().backward()
    (expected * cotangent).sum().backward()
    gradients = {f"vision_model.{name}": p.grad for name, p in reference.vision_model.named_parameters()}
    gradients = {name: g for name, g in gradients.items() if ".head." not in name}
    for name, weight in zip(("0.weight", "0.bias", "2.weight", "2.bias"), weights, strict=True):
        gradients[f"model.multi_modal_projector.{name}"] = weight.grad
    total = torch.stack([g.norm() for g in gradients.values()]).norm()
    assert {binding.name for binding in encoder.bindings()} == set(gradients)
    for binding in encoder.bindings():
        deviation = (binding.tensor.grad - gradients[binding.name]).norm()
        assert deviation <= 1e-5 * gradients[binding.name].norm() + 1e-7 * total, binding.name


PREPROCESSING = {
    "mean and std": dict(image_mean=[0.48, 0.46, 0.41], image_std=[0.27, 0.26, 0.28]),
    "bilinear, as SigLIP 2": dict(resample=2),
    "nearest": dict(resample=0),
    "no normalisation": dict(do_normalize=False),
    "another factor": dict(rescale_factor=1 / 127.5, image_mean=[1.0] * 3, image_std=[1.0] * 3),
    "no rescaling": dict(do_rescale=False, image_mean=[100.0] * 3, image_std=[50.0] * 3),
}


@pytest.mark.parametrize("kind", PREPROCESSING)
def test_the_directory_s_preprocessing_is_used(kind: str, siglip: tuple[Path, SiglipModel], tmp_path: Path):
    shutil.copytree(siglip[0], tmp_path / "own")
    preprocess = SiglipImageProcessorPil(size={"height": 24, "width": 24}, **PREPROCESSING[kind])
    preprocess.save_pretrained(tmp_path / "own")
    processor = build_processor("vision", configuration(tmp_path / "own")[1])
    images = [Image.open(io.BytesIO(data)) for data in FILES]
    expected = preprocess(images, return_tensors="pt")["pixel_values"]
    inputs = processor.collate([processor.decode(data) for data in FILES])["pixels"]
    seen: list[torch.Tensor] = []
    encoder = build(tmp_path / "own")
    encoder.tower.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    encoder(inputs)
    torch.testing.assert_close(seen[0], expected, rtol=1e-5, atol=1e-5)  # fp32: roundings in another order


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": {"height": 32, "width": 32}}, "'size': {'height': 32, 'width': 32}"),
        ({"size": {"shortest_edge": 24}}, "shortest_edge"),
        ({"do_resize": False}, "'do_resize': False"),
        ({"do_center_crop": True}, "do_center_crop"),
        ({"do_pad": True}, "do_pad"),
        ({"max_num_patches": 256}, "max_num_patches"),  # SigLIP 2 with images of any shape
        ({"image_std": [0.5, 0.0, 0.5]}, "cannot be followed"),
        ({"image_mean": [0.5, 0.5]}, "cannot be followed"),
        ({"image_mean": "half"}, "cannot be followed"),
        ({"resample": 17}, "cannot be followed"),
    ],
)
def test_preprocessing_that_differs_is_refused(options: dict, message: str, siglip: tuple[Path, SiglipModel]):
    hf_config = configuration(siglip[0])[1] | {"vision_processor": options}
    with pytest.raises(ConfigError, match=f"vision_processor: .*{message}"):
        build_processor("vision", hf_config)


def test_the_projector_of_an_export_is_loaded(siglip: tuple[Path, SiglipModel], tmp_path: Path):
    shutil.copytree(siglip[0], tmp_path / "own")
    tensors = load_file(tmp_path / "own" / "model.safetensors")
    names = [f"model.multi_modal_projector.{name}" for name in ("0.weight", "0.bias", "2.weight", "2.bias")]
    shapes = [(HIDDEN, 32), (HIDDEN,), (HIDDEN, HIDDEN), (HIDDEN,)]
    projector = {name: torch.randn(shape) for name, shape in zip(names, shapes, strict=True)}
    save_file(tensors | projector, tmp_path / "own" / "model.safetensors", metadata={"format": "pt"})
    loaded = {binding.name: binding.tensor for binding in build(tmp_path / "own").bindings()}
    assert all(torch.equal(loaded[name], tensor) for name, tensor in projector.items())
    encoder = build(siglip[0])
    message = "has no projector, while model.hf_path .* holds the same encoder with a trained one"
    with pytest.raises(ConfigError, match=message):
        check_own_directory("vision", encoder, str(siglip[0]), str(tmp_path / "own"))
    check_own_directory("vision", encoder, str(tmp_path / "own"), str(siglip[0]))


def test_the_projector_is_drawn_and_the_tower_is_loaded(siglip: tuple[Path, SiglipModel]):
    folder, reference = siglip
    encoder = build(folder)
    stored = {f"vision_model.{name}": tensor for name, tensor in reference.vision_model.state_dict().items()}
    projector = {id(parameter) for parameter in encoder.projector_parameters()}
    for binding in encoder.bindings():
        if id(binding.tensor) not in projector:
            assert torch.equal(binding.tensor, stored[binding.name]), binding.name
    assert encoder.projector[0].weight.std().item() == pytest.approx(TOWER["hidden_size"] ** -0.5, rel=0.1)
    assert not encoder.projector[2].bias.any()
    assert isinstance(encoder.projector[1], nn.GELU)


def test_a_directory_without_weights_or_tower_is_named(tmp_path: Path, siglip: tuple[Path, SiglipModel]):
    with pytest.raises(ConfigError, match=r"`modules.vision.hf_path`: .* has no config.json"):
        configuration(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip_vision_model", **TOWER}))
    with pytest.raises(CheckpointError, match="holds neither model.safetensors.index.json nor model.safetensors"):
        build(tmp_path)


def test_operations_are_those_of_the_matrices_and_of_attention(siglip: tuple[Path, SiglipModel]):
    patches, layers, width, inner = 9, 3, 32, 48
    linears = 3 * 64 * width + layers * (4 * width * width + 2 * width * inner) + width * HIDDEN + HIDDEN * HIDDEN
    expected = 2 * patches * linears + layers * 2 * 2 * patches**2 * width
    assert build(siglip[0]).flops([MediaHeader(width=5, height=7)] * 2) == 2 * expected

"""Images become the same patches, positions and soft tokens as in transformers, and damaged files are refused."""

import io
import random

import numpy as np
import pytest
import torch
import yaml
from PIL import Image, ImageOps
from transformers.models.gemma4.image_processing_pil_gemma4 import (
    Gemma4ImageProcessorPil,
    get_aspect_ratio_preserving_size,
)

from mimo_gemma4.encoders.gemma4_vision_processor import Gemma4ImageProcessor
from mimo_gemma4.encoders.image_file import read_image
from mimo_gemma4.encoders.registry import build_processor
from mimo_gemma4.errors import ConfigError
from mimo_gemma4.media import MediaHeader
from tests import REPOSITORY

SIZES = [(640, 480), (64, 64), (17, 900), (900, 17), (1, 1), (383, 385), (768, 96)]
TINY = {
    "vision_config": dict(
        model_type="gemma4_vision",
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        head_dim=8,
        patch_size=16,
        pooling_kernel_size=3,
        position_embedding_size=64,
    )
}


def encode(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    channels = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(pixels.squeeze(-1) if channels == 1 else pixels, mode)


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its side, as phones do
    return encode(picture(300, 200), "JPEG", exif=exif)


FILES = {f"{w}x{h}": encode(picture(w, h)) for w, h in SIZES} | {
    "grey": encode(picture(100, 60, "L")),
    "transparent": encode(picture(100, 60, "RGBA")),
    "palette": encode(picture(100, 60).convert("P"), transparency=3),
    "rotated": rotated(),
}


@pytest.mark.parametrize("name", FILES)
def test_patches_and_positions_equal_transformers(name: str):
    stored = Image.open(io.BytesIO(FILES[name]))
    upright = ImageOps.exif_transpose(stored)  # as transformers' `load_image` does
    expected = Gemma4ImageProcessorPil(max_soft_tokens=70)(upright, return_tensors="pt")
    count = expected["num_soft_tokens_per_image"][0] * 9

    processor = Gemma4ImageProcessor(max_soft_tokens=70)
    item = processor.decode(FILES[name])
    inputs = processor.collate([item])
    # transformers orders patches by line of the image, this project by soft token: compare place by place.
    x, y = inputs["positions"].T
    by_line = torch.argsort(y * 10_000 + x)
    torch.testing.assert_close(inputs["positions"][by_line], expected["image_position_ids"][0, :count], rtol=0, atol=0)
    torch.testing.assert_close(
        inputs["pixel_values"][by_line], expected["pixel_values"][0, :count], rtol=0, atol=1e-6, check_dtype=True
    )  # one rounding of x / 255 against x * (1 / 255)
    header = MediaHeader(width=stored.width, height=stored.height)  # before EXIF rotation, as an index reads it
    assert processor.soft_tokens(header) * 9 == count == inputs["lengths"][0]
    placeholder = processor.placeholder(header)
    assert {key: tensor.shape for key, tensor in placeholder.items()} == {key: t.shape for key, t in item.items()}
    assert not placeholder["pixel_values"].any()


def test_soft_tokens_equal_transformers_for_any_size():
    sizes = random.Random(0)
    for _ in range(2000):
        width, height = (int(2 ** sizes.uniform(0, 13)) for _ in range(2))
        budget = sizes.choice([70, 280, 1120])
        tall, wide = get_aspect_ratio_preserving_size(height, width, 16, budget * 9, 3)
        across, down = Gemma4ImageProcessor(max_soft_tokens=budget).grid(MediaHeader(width=width, height=height))
        assert (across * 48, down * 48) == (wide, tall)


def test_a_soft_token_holds_the_patches_of_its_own_square():
    pixels = np.zeros((96, 144, 3), dtype=np.uint8)  # 2 x 3 soft tokens, each of one colour
    for square in range(6):
        top, left = square // 3 * 48, square % 3 * 48
        pixels[top : top + 48, left : left + 48] = 40 * square
    processor = Gemma4ImageProcessor(max_soft_tokens=6)
    patches = processor.decode(encode(Image.fromarray(pixels)))["pixel_values"].view(6, 9, -1)
    assert torch.equal(patches, (40 * torch.arange(6) / 255).view(6, 1, 1).expand_as(patches))


def test_collate_groups_equal_sizes_and_remembers_the_order_of_items():
    processor = Gemma4ImageProcessor(max_soft_tokens=4)
    sizes = [(96, 48), (48, 48), (48, 96), (96, 96), (48, 48)]
    items = [processor.decode(encode(Image.new("RGB", size, (i, 0, 0)))) for i, size in enumerate(sizes)]
    inputs = processor.collate(items)
    assert inputs["lengths"] == sorted(inputs["lengths"])
    assert sum(inputs["lengths"]) == len(inputs["pixel_values"]) == len(inputs["positions"])
    red = (inputs["pixel_values"][:, 0] * 255).round().view(-1, 9)[:, 0]  # of every soft token
    counts = [item["pixel_values"].shape[0] // 9 for item in items]
    assert red[inputs["soft_token_order"]].tolist() == [i for i, count in enumerate(counts) for _ in range(count)]


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_damaged_files_raise_value_or_os_error(format: str):
    data = encode(picture(120, 90), format)
    processor = Gemma4ImageProcessor(max_soft_tokens=4)
    assert processor.decode(data)["pixel_values"].shape == (18, 768)
    for fraction in (0.0, 0.01, 0.3, 0.9):
        with pytest.raises((OSError, ValueError)):
            processor.decode(data[: int(fraction * len(data))])
    position = random.Random(1)
    for _ in range(60):
        damaged = bytearray(data)
        for _ in range(8):
            damaged[position.randrange(min(len(data), 600))] = position.randrange(256)
        try:
            processor.decode(bytes(damaged))  # damage may happen to be a valid image
        except (OSError, ValueError):
            pass


def test_decompression_bombs_are_refused(monkeypatch):
    data = encode(Image.new("RGB", (400, 400)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400 * 400 // 2 - 1)
    with pytest.raises(ValueError, match="DecompressionBombError"):
        Gemma4ImageProcessor().decode(data)


def test_the_tiny_preset_keeps_the_native_size_of_one_and_two_digits():
    preset = REPOSITORY / "configs" / "model" / "gemma4_tiny.yaml"
    processor = build_processor("vision", yaml.safe_load(preset.read_text()))
    assert [processor.grid(MediaHeader(width=w, height=h)) for w, h in [(48, 48), (96, 48)]] == [(1, 1), (2, 1)]
    image = picture(96, 48)
    pixels = processor.decode(encode(image))["pixel_values"] * 255
    assert torch.equal(pixels.round().sum(), torch.tensor(np.array(image)).float().sum())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_soft_tokens": 0}, r"vision_processor.max_soft_tokens is 0"),
        ({"max_soft_token": 4}, r"unknown keys \['max_soft_token'\]"),
        ({"patch_size": 12}, r"vision_processor.patch_size is 12, but vision_config.patch_size is 16"),
        ({"max_soft_tokens": 22}, r"66 patches long, but vision_config.position_embedding_size is 64"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(options: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        build_processor("vision", TINY | {"vision_processor": options})


def test_cost_counts_linears_by_patch_and_attention_by_pair_of_patches():
    processor = build_processor("vision", TINY | {"vision_processor": {"max_soft_tokens": 8}})
    linears = 2 * (2 * 32 * (4 * 4 * 8 + 3 * 48) + 768 * 32)
    attention = 2 * 2 * 2 * 4 * 8  # scores and values, multiply and add, 2 layers, 4 heads of 8
    for width, height, patches in [(48, 48, 36), (96, 192, 72), (1000, 10, 72), (10, 30, 36)]:
        assert processor.cost(MediaHeader(width=width, height=height)) == patches * (linears + attention * patches)


@pytest.mark.parametrize("transparent", [None, 40_000])
def test_grey_images_of_16_bits_are_scaled_not_clipped(transparent: int | None):
    """Pillow's own conversion makes everything above 255 white. Rounded to the nearest of 256 levels."""
    values = np.array([[0, 128, 129, 255], [256, 40_000, 65_406, 65_535]], np.uint16)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "png", **({} if transparent is None else {"transparency": transparent}))
    expected = np.round(values / 257.0).astype(np.uint8)
    if transparent is not None:
        expected[values == transparent] = 255
    assert np.array_equal(np.asarray(read_image(buffer.getvalue())), np.repeat(expected[..., None], 3, axis=2))

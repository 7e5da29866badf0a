"""A decoder is found from one file; what it cannot be built from is named, and its targets are those of the image."""

import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mimo_gemma4 import decoders
from mimo_gemma4.config import ModelConfig, ModuleLayout
from mimo_gemma4.config.presets import load_model_config
from mimo_gemma4.decoders.registry import build_target_processors, decoder_class, registered_decoders
from mimo_gemma4.distributed.layout import build_layout
from mimo_gemma4.encoders.gemma4_vision_processor import Gemma4FrameProcessor, Gemma4ImageProcessor
from mimo_gemma4.encoders.registry import build_processor
from mimo_gemma4.errors import ConfigError
from mimo_gemma4.media import MediaHeader
from mimo_gemma4.train.setup import check_decoder_names
from tests import REPOSITORY

IMAGES = Gemma4ImageProcessor(patch_size=8, pooling_kernel_size=2, max_soft_tokens=6)
THIRD_PARTY = "from mimo_gemma4.decoders.pixel_regression import PixelRegression\n\n\nclass Other(PixelRegression):\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(decoders, "__path__", [*decoders.__path__, str(tmp_path)])
    return tmp_path


def test_the_guide_shows_parts_of_the_file():
    guide = (REPOSITORY / "docs" / "add_a_decoder.md").read_text(encoding="utf-8")
    shipped = (REPOSITORY / "mimo_gemma4" / "decoders" / "pixel_regression.py").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", guide, flags=re.DOTALL | re.MULTILINE)
    assert blocks and all(block in shipped for block in blocks)


def test_a_new_file_is_a_new_decoder(folder: Path):
    (folder / "third_party_decoder.py").write_text(THIRD_PARTY + '    architecture = "third_party"\n')
    assert decoder_class("pixels", "third_party").__module__ == "mimo_gemma4.decoders.third_party_decoder"


def test_two_decoders_of_one_name_are_refused(folder: Path):
    (folder / "clashing_decoder.py").write_text(THIRD_PARTY + '    architecture = "pixel_regression"\n')
    with pytest.raises(ConfigError, match="two decoders are registered as 'pixel_regression'.*rename one"):
        registered_decoders()


def test_unknown_decoders_and_options_name_the_known_ones():
    with pytest.raises(ConfigError, match=r"`modules.pixels.decoder` is 'pixel_regresion'.*`pixel_regression`\?"):
        build_target_processors("pixels", "pixel_regresion", None, [])
    with pytest.raises(ConfigError, match=r"`modules.pixels.decoder_options.hiden_size`.*`hidden_size`\?"):
        build_target_processors("pixels", "pixel_regression", {"hiden_size": 4}, [])
    with pytest.raises(ConfigError, match=r"`modules.pixels.decoder_options.hidden_size` must be int, not 'wide'"):
        build_target_processors("pixels", "pixel_regression", {"hidden_size": "wide"}, [])


def test_a_decoder_of_pixels_refuses_sounds():
    sounds = build_processor("audio", load_model_config(ModelConfig(preset="gemma4_tiny")))
    with pytest.raises(ConfigError, match="`modules.noise.decoder` pixel_regression: .* items of audio are not"):
        build_target_processors("noise", "pixel_regression", None, [sounds])


def test_a_decoder_called_like_an_encoder_of_the_model_is_refused():
    modules = {"vision": ModuleLayout(1), "language": ModuleLayout(1), "audio": ModuleLayout(1, reads="vision")}
    layout = build_layout(modules, 3)
    with pytest.raises(ConfigError, match="`layout.audio` has `reads`.* an encoder called audio"):
        check_decoder_names(layout, {"audio_config": {"hidden_size": 4}})
    check_decoder_names(layout, {"audio_config": None})


def test_mean_colours_are_those_of_the_image_as_its_encoder_sees_it():
    pixels = np.random.default_rng(0).integers(0, 256, (40, 70, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    frames = Gemma4FrameProcessor(patch_size=8, pooling_kernel_size=2, max_soft_tokens=6)
    processors = build_target_processors("pixels", "pixel_regression", None, [IMAGES, frames])
    assert list(processors) == ["image", "video"]
    header = MediaHeader(width=70, height=40)
    across, down = IMAGES.grid(header)
    resized = Image.fromarray(pixels).resize((across * 16, down * 16), Image.Resampling.BICUBIC)
    squares = np.asarray(resized, np.float64).reshape(down, 16, across, 16, 3) / 255
    expected = torch.from_numpy(squares.mean(axis=(1, 3)).reshape(-1, 3)).float()
    item = processors["image"].decode(buffer.getvalue())
    torch.testing.assert_close(item["colours"], expected, atol=1e-6, rtol=0)  # means of 256 fp32 numbers below 1
    assert item["colours"].shape == processors["image"].placeholder(header)["colours"].shape
    joined = processors["image"].collate([item, item])["colours"]
    assert torch.equal(joined, torch.cat([item["colours"], item["colours"]]))

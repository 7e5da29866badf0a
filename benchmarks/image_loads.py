"""Samples with images for benchmarks: their operations, and shards that are quick to write and to decode."""

import io
import json
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from mimo_gemma4.data.tokenizer import byte_media_tokens
from mimo_gemma4.encoders.gemma4_vision_config import Gemma4VisionConfig
from mimo_gemma4.encoders.gemma4_vision_processor import Gemma4ImageProcessor
from mimo_gemma4.flops import text_flops
from mimo_gemma4.language.config import Gemma4TextConfig
from mimo_gemma4.media import MediaHeader

TEXT_TOKENS = 300
"""Text tokens of a sample, approximately: a byte is a token."""


@dataclass(frozen=True)
class Load:
    """Images of a sample, and samples of a step."""

    name: str
    images: int
    """Number of images of a sample."""
    size: tuple[int, int]
    """Width and height of an image in pixels, chosen for `soft_tokens` so that it is not resized."""
    soft_tokens: int
    samples: int
    """Number of samples of a step."""
    seq_length: int
    """Length of the longest pack."""


LOADS = [Load("light", 1, (960, 672), 280, 144, 5120), Load("heavy", 4, (1920, 1344), 1120, 8, 5120)]
TINY_LOADS = [Load("light", 1, (96, 48), 2, 6, 700), Load("heavy", 4, (192, 96), 8, 4, 700)]


@dataclass(frozen=True)
class Operations:
    """Forward operations of a sample, by module."""

    vision: float
    language: float

    @classmethod
    def of(cls, hf_config: dict[str, Any], load: Load) -> "Operations":
        """Operations of a sample of `load`."""
        text, vision = Gemma4TextConfig.from_hf(hf_config), Gemma4VisionConfig.from_config(hf_config)
        images, (width, height) = Gemma4ImageProcessor.from_config(hf_config), load.size
        header = MediaHeader(width=width, height=height)
        soft_tokens = images.soft_tokens(header)
        image = images.cost(header) + 2.0 * vision.hidden_size * text.hidden_size * soft_tokens
        return cls(load.images * image, text_flops(text, [load.images * soft_tokens + TEXT_TOKENS]).forward)

    @property
    def vision_share(self) -> float:
        """The encoder's share of the operations of both modules."""
        return self.vision / (self.vision + self.language)


def with_byte_tokens(hf_config: dict[str, Any]) -> dict[str, Any]:
    """The model configuration with the byte-level tokenizer's ids of images and videos."""
    image, video = (byte_media_tokens()[media_type] for media_type in ("image", "video"))
    ids = {"boi_token_id": image.begin, "image_token_id": image.soft, "eoi_token_id": image.end}
    return hf_config | ids | {"video_token_id": video.soft}


def write_shard(path: Path, load: Load) -> None:
    """Write the samples of a step. Their images have one colour, which is quick to write and to decode."""
    text = "What can be seen here? ".ljust(TEXT_TOKENS // 2, ".")
    answer = {"type": "text", "text": text}
    question = [*({"type": "image"} for _ in range(load.images)), answer]
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": [answer]}]
    files = {"json": json.dumps({"messages": messages}).encode()}
    for number in range(load.images):
        picture = io.BytesIO()
        Image.new("RGB", load.size, (50 * number, 100, 150)).save(picture, "png")
        files[f"{number}.png"] = picture.getvalue()
    with tarfile.open(path, "w") as tar:
        for sample in range(load.samples):
            for extension, data in files.items():
                member = tarfile.TarInfo(f"{sample:04}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))

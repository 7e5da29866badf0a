"""Samples with images for benchmarks: how heavy they are, and shards of them that nobody waits for."""

import io
import json
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from mimo_gemma4.data.tokenizer import byte_media_tokens
from mimo_gemma4.encoders.gemma4_image import Gemma4ImageProcessor
from mimo_gemma4.encoders.gemma4_vision_config import Gemma4VisionConfig
from mimo_gemma4.flops import text_flops
from mimo_gemma4.language.config import Gemma4TextConfig
from mimo_gemma4.media import MediaHeader

TEXT_TOKENS = 300
"""About as many tokens of text has a sample: a byte is a token."""


@dataclass(frozen=True)
class Load:
    """What samples look like, and how many make a step."""

    name: str
    images: int
    """Images of a sample."""
    size: tuple[int, int]
    """Their width and height in pixels: those of so many soft tokens, so that nothing is resized."""
    soft_tokens: int
    samples: int
    """Samples of a step."""
    seq_length: int
    """Longest pack."""


LOADS = [Load("light", 1, (960, 672), 280, 144, 5120), Load("heavy", 4, (1920, 1344), 1120, 8, 5120)]
TINY_LOADS = [Load("light", 1, (96, 48), 2, 6, 700), Load("heavy", 4, (192, 96), 8, 4, 700)]


@dataclass(frozen=True)
class Operations:
    """Forward operations of a sample, by module."""

    vision: float
    language: float

    @classmethod
    def of(cls, hf_config: dict[str, Any], load: Load) -> "Operations":
        """Count those of a sample of `load`."""
        text, vision = Gemma4TextConfig.from_hf(hf_config), Gemma4VisionConfig.from_config(hf_config)
        images, (width, height) = Gemma4ImageProcessor.from_config(hf_config), load.size
        header = MediaHeader(width=width, height=height)
        rows = images.soft_tokens(header)
        image = images.cost(header) + 2.0 * vision.hidden_size * text.hidden_size * rows
        return cls(load.images * image, text_flops(text, [load.images * rows + TEXT_TOKENS]).forward)

    @property
    def vision_share(self) -> float:
        """Of both modules' operations."""
        return self.vision / (self.vision + self.language)


def with_byte_tokens(hf_config: dict[str, Any]) -> dict[str, Any]:
    """The model with the byte-level tokenizer's ids for images and videos in place of its own."""
    image, video = (byte_media_tokens()[media_type] for media_type in ("image", "video"))
    ids = {"boi_token_id": image.begin, "image_token_id": image.soft, "eoi_token_id": image.end}
    return hf_config | ids | {"video_token_id": video.soft}


def write_shard(path: Path, load: Load) -> None:
    """The samples of a step. Images of one colour are quickly written and decoded, and cost a tower what others do."""
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

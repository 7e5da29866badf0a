"""Images for the Gemma 4 vision tower: file bytes → resized, cut into patches, collated without padding.

Sizes follow Gemma 4's rule: the aspect ratio is kept and both sides become multiples of patch_size *
pooling_kernel_size, as large as max_soft_tokens * pooling_kernel_size**2 patches allow; small images grow.
"""

import math
from dataclasses import dataclass, fields
from itertools import accumulate
from typing import Any, ClassVar, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mimo_gemma4.encoders.gemma4_vision_config import Gemma4VisionConfig
from mimo_gemma4.encoders.image_file import read_image
from mimo_gemma4.errors import ConfigError
from mimo_gemma4.media import MediaHeader

DEFAULTS = {"max_soft_tokens": 280, "max_frame_tokens": 70, "num_frames": 32}
"""Soft tokens of an image and of a video's frame (no more than an image's), and frames of a video, at most."""


@dataclass(frozen=True)
class Gemma4ImageProcessor:
    """The `MediaProcessor` of Gemma 4 images.

    An item is {"pixel_values": [patches, patch_size**2 * 3] float32 in [0, 1] laid out (row, column, channel),
    "grid": [2] int64, the soft tokens across and down}. Patches are ordered by soft token, left to right and top to
    bottom, and in the same way inside each soft token, so that pooling is a reshape.
    """

    patch_size: int = 16
    """Pixels on the side of a patch."""
    pooling_kernel_size: int = 3
    """Patches on the side of a soft token."""
    max_soft_tokens: int = DEFAULTS["max_soft_tokens"]
    """Largest number of soft tokens of one image."""
    linear_cost: float = 1.0
    """Tower operations per patch that do not depend on the image's size (projections, MLP) …"""
    attention_cost: float = 0.0
    """… and those per pair of patches (attention); only the ratio matters."""

    modality = "vision"
    content_type = "image"
    budget: ClassVar[str] = "max_soft_tokens"
    """The key of `vision_processor` that bounds an item's soft tokens."""

    @classmethod
    def from_config(cls, hf_config: dict[str, Any]) -> Self:
        """Read `vision_processor`, then `vision_config`, then defaults. Raises `ConfigError` where the two disagree."""
        vision = Gemma4VisionConfig.from_config(hf_config)
        options = processor_options(hf_config, vision.patch_size, vision.pooling_kernel_size)
        processor = cls(
            patch_size=vision.patch_size,
            pooling_kernel_size=vision.pooling_kernel_size,
            max_soft_tokens=options[cls.budget],
            linear_cost=vision.linear_flops,
            attention_cost=vision.attention_flops,
            **{field.name: options[field.name] for field in fields(cls) if field.name == "num_frames"},
        )
        longest = processor.max_soft_tokens * processor.pooling_kernel_size
        if longest > vision.position_embedding_size:
            raise ConfigError(
                f"with vision_processor.{cls.budget}={processor.max_soft_tokens} an image can be {longest} patches "
                f"long, but vision_config.position_embedding_size is {vision.position_embedding_size}"
            )
        return processor

    def grid(self, header: MediaHeader) -> tuple[int, int]:
        """Soft tokens across and down of an image. Raises `ValueError` for a size that no grid fits.

        The formula is that of transformers' `get_aspect_ratio_preserving_size`. It is symmetric in width and height, so
        an EXIF rotation changes neither `soft_tokens` nor `cost`.
        """
        width, height = header.width, header.height
        if width < 1 or height < 1:
            raise ValueError(f"image of {width}x{height} pixels")
        patches = self.max_soft_tokens * self.pooling_kernel_size**2
        factor = math.sqrt(patches * self.patch_size**2 / (width * height))
        side = self.patch_size * self.pooling_kernel_size
        across, down = math.floor(factor * width / side), math.floor(factor * height / side)
        if across == 0 and down == 0:
            raise ValueError(
                f"image of {width}x{height} pixels does not fit {self.max_soft_tokens} soft tokens; raise "
                f"vision_processor.{self.budget}"
            )
        if down == 0:
            return min(width // height, self.max_soft_tokens), 1
        if across == 0:
            return 1, min(height // width, self.max_soft_tokens)
        return across, down

    def soft_tokens(self, header: MediaHeader) -> int:
        """Soft tokens of an image. Raises `ValueError` as `grid` does."""
        across, down = self.grid(header)
        return across * down

    def cost(self, header: MediaHeader) -> float:
        """Operations of the tower's forward for an image, up to a constant factor."""
        patches = self.soft_tokens(header) * self.pooling_kernel_size**2
        return patches * (self.linear_cost + self.attention_cost * patches)

    def decode(self, data: bytes) -> dict[str, Tensor]:
        """Read a file, resize the image (bicubic) and cut it into patches. Raises as `read_image` does."""
        image = read_image(data)
        across, down = self.grid(MediaHeader(width=image.width, height=image.height))
        side = self.patch_size * self.pooling_kernel_size
        image = image.resize((across * side, down * side), Image.Resampling.BICUBIC)  # a copy where the size is right
        pixels = torch.from_numpy(np.array(image)).to(torch.float32) / 255
        k, p = self.pooling_kernel_size, self.patch_size
        patches = pixels.view(down, k, p, across, k, p, 3).permute(0, 3, 1, 4, 2, 5, 6)
        return {"pixel_values": patches.reshape(-1, p * p * 3), "grid": torch.tensor([across, down])}

    def placeholder(self, header: MediaHeader) -> dict[str, Tensor]:
        """A black image of the size that `decode` would give."""
        grid = self.grid(header)
        patches = math.prod(grid) * self.pooling_kernel_size**2
        return {"pixel_values": torch.zeros(patches, self.patch_size**2 * 3), "grid": torch.tensor(grid)}

    def collate(self, items: list[dict[str, Tensor]]) -> dict[str, Any]:
        """Concatenate images, those with equally many patches next to each other: they can be one batch in attention.

        Returns pixel_values [P, patch_size**2 * 3]; positions [P, 2], the patches' (x, y); lengths, the patches of each
        image in the order of pixel_values (host list), and boundaries [images + 1] int32, their cumulative sums;
        soft_token_order [soft tokens], for each soft token in the order of `items`, its place in that of pixel_values.
        """
        order = sorted(range(len(items)), key=lambda i: items[i]["pixel_values"].shape[0])
        lengths = [items[i]["pixel_values"].shape[0] for i in order]
        starts, total = [0] * len(items), 0
        for i, length in zip(order, lengths, strict=True):
            starts[i], total = total, total + length // self.pooling_kernel_size**2
        counts = [item["pixel_values"].shape[0] // self.pooling_kernel_size**2 for item in items]
        return {
            "pixel_values": torch.cat([items[i]["pixel_values"] for i in order]),
            "positions": torch.cat([self._positions(*items[i]["grid"].tolist()) for i in order]),
            "lengths": lengths,
            "boundaries": torch.tensor([0, *accumulate(lengths)], dtype=torch.int32),
            "soft_token_order": torch.cat([torch.arange(s, s + n) for s, n in zip(starts, counts, strict=True)]),
        }

    def transformers_inputs(self, items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Items as arguments of transformers' Gemma 4, for comparisons: padded to the largest image.

        pixel_values [images, patches, patch_size**2 * 3], image_position_ids [images, patches, 2].
        """
        patches = max(len(item["pixel_values"]) for item in items)
        pixels = torch.zeros(len(items), patches, items[0]["pixel_values"].shape[1])
        positions = torch.full((len(items), patches, 2), -1)
        for number, item in enumerate(items):
            pixels[number, : len(item["pixel_values"])] = item["pixel_values"]
            positions[number, : len(item["pixel_values"])] = self._positions(*item["grid"].tolist())
        return {"pixel_values": pixels, "image_position_ids": positions}

    def _positions(self, across: int, down: int) -> Tensor:
        """(x, y) of every patch of an image, in the order of `pixel_values`."""
        k = self.pooling_kernel_size
        y, x = torch.meshgrid(torch.arange(down * k), torch.arange(across * k), indexing="ij")
        positions = torch.stack([x, y], dim=-1).view(down, k, across, k, 2)
        return positions.permute(0, 2, 1, 3, 4).reshape(-1, 2)


@dataclass(frozen=True)
class Gemma4FrameProcessor(Gemma4ImageProcessor):
    """The `FrameProcessor` of Gemma 4: frames are images of a smaller budget."""

    num_frames: int = DEFAULTS["num_frames"]
    """Most frames of a video; more are thinned out evenly."""

    content_type = "video"
    budget = "max_frame_tokens"

    def sample(self, frames: int) -> list[int]:
        """Frames at even distances, as transformers' `Gemma4VideoProcessor` takes them; all of a shorter video."""
        taken = min(self.num_frames, frames)
        return [number * frames // taken for number in range(taken)]

    def transformers_inputs(self, items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Frames as arguments of transformers' Gemma 4, which joins the videos of a sample: for it they are one."""
        frames = super().transformers_inputs(items)
        return {
            "pixel_values_videos": frames["pixel_values"],
            "video_position_ids": frames["image_position_ids"],
            "num_frames_per_video": torch.tensor([len(items)]),
        }


def processor_options(hf_config: dict[str, Any], patch_size: int, pooling_kernel_size: int) -> dict[str, int]:
    """All of `vision_processor`, with defaults; `patch_size` and `pooling_kernel_size` are those of `vision_config`.

    Raises `ConfigError` for unknown keys, values that are not positive integers, and sizes other than the model's.
    """
    model = {"patch_size": patch_size, "pooling_kernel_size": pooling_kernel_size}
    given = dict(hf_config.get("vision_processor") or {})
    if unknown := sorted(set(given) - set(DEFAULTS) - set(model)):
        raise ConfigError(f"vision_processor has unknown keys {unknown}; known: {', '.join([*model, *DEFAULTS])}")
    for key, value in given.items():
        if not isinstance(value, int) or value < 1:
            raise ConfigError(f"vision_processor.{key} is {value!r}; it must be a positive integer")
        if key in model and value != model[key]:
            raise ConfigError(f"vision_processor.{key} is {value}, but vision_config.{key} is {model[key]}")
    options = DEFAULTS | model | given
    if "max_frame_tokens" not in given:
        options["max_frame_tokens"] = min(options["max_frame_tokens"], options["max_soft_tokens"])
    return options

"""Images and sounds for Gemma 4 12B (`gemma4_unified`): file bytes → squares of pixels, stretches of samples."""

from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from mimo_gemma4.encoders.gemma4_vision_processor import Gemma4FrameProcessor, Gemma4ImageProcessor, processor_options
from mimo_gemma4.encoders.waveform import MAX_SAMPLES, read_waveform, resampled_length
from mimo_gemma4.errors import ConfigError
from mimo_gemma4.media import MediaHeader


@dataclass(frozen=True)
class Gemma4UnifiedVisionConfig:
    """The keys of `vision_config` that the embedder reads; the defaults are those of the 12B model."""

    patch_size: int = 16
    """Pixels on the side of a patch."""
    pooling_kernel_size: int = 3
    """Patches on the side of a soft token."""
    mm_embed_dim: int = 3840
    """Width of the embedding of a square."""
    mm_posemb_size: int = 1120
    """Rows of the x and y position tables: the most soft tokens along one side of an image."""
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    """Standard deviation of random initial weights."""

    @classmethod
    def from_config(cls, hf_config: dict[str, Any]) -> Self:
        """Read `hf_config["vision_config"]`; unknown keys are ignored. Raises `ConfigError`."""
        section = hf_config.get("vision_config") or {}
        config = cls(**_known(cls, section))
        if (width := section.get("output_proj_dims", config.mm_embed_dim)) != config.mm_embed_dim:
            raise ConfigError(f"vision_config.output_proj_dims is {width}, but mm_embed_dim is {config.mm_embed_dim}")
        return config

    @property
    def side(self) -> int:
        """Pixels on the side of a soft token."""
        return self.patch_size * self.pooling_kernel_size


@dataclass(frozen=True)
class Gemma4UnifiedAudioConfig:
    """The keys of `audio_config` that the embedder reads; the defaults are those of the 12B model."""

    audio_embed_dim: int = 640
    """Samples at 16 kHz of a soft token."""
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    """Standard deviation of random initial weights."""

    @classmethod
    def from_config(cls, hf_config: dict[str, Any]) -> Self:
        """Read `hf_config["audio_config"]`; unknown keys are ignored. Raises `ConfigError`."""
        section = hf_config.get("audio_config") or {}
        config = cls(**_known(cls, section))
        if (width := section.get("output_proj_dims", config.audio_embed_dim)) != config.audio_embed_dim:
            raise ConfigError(f"audio_config.output_proj_dims is {width}, but audio_embed_dim={config.audio_embed_dim}")
        return config


class Gemma4UnifiedImageProcessor(Gemma4ImageProcessor):
    """The `MediaProcessor` of 12B images: sizes as for the other models, a soft token being one patch of their size."""

    @classmethod
    def from_config(cls, hf_config: dict[str, Any]) -> Self:
        """Read `vision_processor`, then `vision_config`, then defaults. Raises `ConfigError` where the two disagree."""
        vision = Gemma4UnifiedVisionConfig.from_config(hf_config)
        options = processor_options(hf_config, vision.patch_size, vision.pooling_kernel_size)
        processor = cls(
            patch_size=vision.side,
            pooling_kernel_size=1,
            max_soft_tokens=options[cls.budget],
            **{field.name: options[field.name] for field in fields(cls) if field.name == "num_frames"},
        )
        if processor.max_soft_tokens > vision.mm_posemb_size:
            raise ConfigError(
                f"with vision_processor.{cls.budget}={processor.max_soft_tokens} an image can be that many soft "
                f"tokens long, but vision_config.mm_posemb_size is {vision.mm_posemb_size}"
            )
        return processor

    def collate(self, items: list[dict[str, Tensor]]) -> dict[str, Any]:
        """Concatenate N squares of images: pixel_values [N, patch_size**2 * 3] and positions [N, 2], their (x, y)."""
        return {
            "pixel_values": torch.cat([item["pixel_values"] for item in items]),
            "positions": torch.cat([self._positions(*item["grid"].tolist()) for item in items]),
        }


@dataclass(frozen=True)
class Gemma4UnifiedFrameProcessor(Gemma4FrameProcessor, Gemma4UnifiedImageProcessor):
    """The `FrameProcessor` of 12B videos: frames are smaller images."""


@dataclass(frozen=True)
class Gemma4UnifiedAudioProcessor:
    """The `MediaProcessor` of 12B sounds. An item is {"waveforms": [N, samples_per_soft_token] float32}."""

    samples_per_soft_token: int = 640
    """Samples at 16 kHz, within [-1, 1], of a soft token; the last one of a sound is filled up with zeros."""

    modality = "audio"
    content_type = "audio"

    @classmethod
    def from_config(cls, hf_config: dict[str, Any]) -> Self:
        """Read `audio_config`. Raises `ConfigError`."""
        return cls(Gemma4UnifiedAudioConfig.from_config(hf_config).audio_embed_dim)

    def soft_tokens(self, header: MediaHeader) -> int:
        """Soft tokens of a sound's first 30 seconds. Raises `ValueError` for an empty one."""
        if header.sample_rate < 1 or header.samples < 1:
            raise ValueError(f"sound of {header.samples} samples at {header.sample_rate} Hz")
        samples = min(max(1, resampled_length(header.samples, header.sample_rate)), MAX_SAMPLES)
        return -(-samples // self.samples_per_soft_token)

    def cost(self, header: MediaHeader) -> float:
        """Soft tokens, each of which costs the same."""
        return float(self.soft_tokens(header))

    def decode(self, data: bytes) -> dict[str, Tensor]:
        """Read a file, mix its channels down to one, resample and cut it. Raises `ValueError` for a damaged file."""
        waveform = torch.from_numpy(read_waveform(data))
        if not len(waveform):
            raise ValueError("the sound is empty")
        missing = -len(waveform) % self.samples_per_soft_token
        return {"waveforms": F.pad(waveform, (0, missing)).view(-1, self.samples_per_soft_token)}

    def placeholder(self, header: MediaHeader) -> dict[str, Tensor]:
        """Silence of the length that `decode` would give."""
        return {"waveforms": torch.zeros(self.soft_tokens(header), self.samples_per_soft_token)}

    def collate(self, items: list[dict[str, Tensor]]) -> dict[str, Any]:
        """Concatenate sounds into waveforms [soft tokens, samples_per_soft_token]."""
        return {"waveforms": torch.cat([item["waveforms"] for item in items])}


def _known(cls: type, section: dict[str, Any]) -> dict[str, Any]:
    names = {field.name for field in fields(cls)}
    return {key: value for key, value in section.items() if key in names and value is not None}

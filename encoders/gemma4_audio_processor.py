"""Sound for the Gemma 4 audio tower: file bytes → mono at 16 kHz → log-mel frames, collated without padding.

A frame every 10 ms is a Hann window of 20 ms; four frames make a soft token. The first window starts half its length
before the sound, and only windows that end inside the sound count.
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from mimo_gemma4.encoders.gemma4_audio_config import MEL_BANDS, Gemma4AudioConfig, half
from mimo_gemma4.encoders.waveform import MAX_SAMPLES, SAMPLE_RATE, read_waveform, resampled_length
from mimo_gemma4.media import MediaHeader

WINDOW, HOP, FFT_SIZE = 320, 160, 512
"""Samples of a frame, between frames, and of the Fourier transform of a frame."""
FLOOR = 1e-3
"""Added to the magnitude of a band before the logarithm."""


@dataclass(frozen=True)
class Gemma4AudioProcessor:
    """The `MediaProcessor` of Gemma 4 audio. An item is {"features": [frames, MEL_BANDS] float32}."""

    audio: Gemma4AudioConfig

    modality = "audio"
    content_type = "audio"

    @classmethod
    def from_config(cls, hf_config: dict[str, Any]) -> Self:
        """Read `audio_config`. Raises `ConfigError`."""
        return cls(Gemma4AudioConfig.from_config(hf_config))

    def frames(self, header: MediaHeader) -> int:
        """Mel frames of a sound. Raises `ValueError` for one too short to fill a window."""
        if header.sample_rate < 1 or header.samples < 1:
            raise ValueError(f"sound of {header.samples} samples at {header.sample_rate} Hz")
        samples = min(resampled_length(header.samples, header.sample_rate), MAX_SAMPLES)
        if samples <= HOP:
            raise ValueError(
                f"sound of {header.samples} samples at {header.sample_rate} Hz; a token takes more than 10 ms"
            )
        return (samples - 1) // HOP

    def soft_tokens(self, header: MediaHeader) -> int:
        """Soft tokens of a sound, one per 40 ms begun. Raises `ValueError` as `frames` does."""
        return half(half(self.frames(header)))

    def cost(self, header: MediaHeader) -> float:
        """Operations of the tower's forward for a sound."""
        return self.audio.flops(self.frames(header))

    def decode(self, data: bytes) -> dict[str, Tensor]:
        """Read a file's first 30 seconds, mix its channels down to one, resample and take log-mel features.

        Raises `ValueError` for a file that is truncated, damaged, no sound, too short, or holds numbers that are not
        finite.
        """
        waveform = read_waveform(data)
        self.frames(MediaHeader(samples=len(waveform), sample_rate=SAMPLE_RATE))  # raises for one that is too short
        return {"features": torch.from_numpy(log_mel(waveform))}

    def placeholder(self, header: MediaHeader) -> dict[str, Tensor]:
        """Silence of the length that `decode` would give."""
        return {"features": torch.full((self.frames(header), MEL_BANDS), math.log(FLOOR))}

    def collate(self, items: list[dict[str, Tensor]]) -> dict[str, Any]:
        """Concatenate sounds.

        Returns, for N soft tokens: features [F, MEL_BANDS]; frame_index [ceil(F / 2), 3] and halved_index [N, 3], the
        inputs of every output of the first and second subsampling convolution, where F and ceil(F / 2) (each rounded up
        sound by sound) stand for a zero outside the sound; positions [N], a soft token's number in its sound; sounds
        [N], the number of its sound; count, the number of sounds (host).
        """
        frames = [len(item["features"]) for item in items]
        halved = [half(length) for length in frames]
        tokens = [half(length) for length in halved]
        return {
            "features": torch.cat([item["features"] for item in items]),
            "frame_index": _convolution_index(frames),
            "halved_index": _convolution_index(halved),
            "positions": torch.cat([torch.arange(length) for length in tokens]),
            "sounds": torch.repeat_interleave(torch.arange(len(tokens)), torch.tensor(tokens)),
            "count": len(tokens),
        }

    def transformers_inputs(self, items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Items as arguments of transformers' Gemma 4, for comparisons: padded to the longest sound.

        input_features [sounds, frames, MEL_BANDS], input_features_mask [sounds, frames], true in the sound.
        """
        features = torch.nn.utils.rnn.pad_sequence([item["features"] for item in items], batch_first=True)
        lengths = torch.tensor([len(item["features"]) for item in items])
        return {
            "input_features": features,
            "input_features_mask": torch.arange(features.shape[1]) < lengths[:, None],
        }


def log_mel(waveform: np.ndarray) -> np.ndarray:
    """[samples] float32 at 16 kHz → [(samples - 1) // 160, MEL_BANDS] float32: log(mel-weighted |STFT| + 1e-3)."""
    padded = np.concatenate([np.zeros(WINDOW // 2, np.float32), waveform])
    frames = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[: len(waveform) - HOP : HOP]
    spectrum = np.abs(np.fft.rfft(frames * _hann_window(), n=FFT_SIZE))
    # torch's product, not numpy's: the latter's threads, one per core, would spin beside the rank that computes.
    mel = torch.from_numpy(spectrum) @ _mel_filters()
    return torch.log(mel + FLOOR).numpy()


@cache
def _hann_window() -> np.ndarray:
    """Periodic Hann window [WINDOW] float32."""
    return (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WINDOW) / WINDOW)).astype(np.float32)


@cache
def _mel_filters() -> Tensor:
    """Triangular filters [FFT_SIZE // 2 + 1, MEL_BANDS] float32, 0 to 8 kHz on HTK's scale 2595 log10(1 + f / 700)."""
    top = 2595 * math.log10(1 + SAMPLE_RATE / 2 / 700)
    edges = 700 * (10 ** (np.linspace(0, top, MEL_BANDS + 2) / 2595) - 1)  # Hz: where filters begin, peak and end
    frequencies = np.linspace(0, SAMPLE_RATE / 2, FFT_SIZE // 2 + 1)[:, None]
    rising = (frequencies - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - frequencies) / (edges[2:] - edges[1:-1])
    return torch.from_numpy(np.maximum(0, np.minimum(rising, falling)).astype(np.float32))


def _convolution_index(lengths: list[int]) -> Tensor:
    """Inputs [outputs, 3] of a convolution of width 3 and stride 2 over sequences that lie end to end.

    Output i of a sequence sees its inputs 2i - 1, 2i, 2i + 1; sum(lengths) stands for an input outside the sequence.
    """
    total, start, parts = sum(lengths), 0, []
    for length in lengths:
        places = 2 * torch.arange(half(length))[:, None] + torch.arange(-1, 2)
        outside = (places < 0) | (places >= length)
        parts.append((places + start).masked_fill(outside, total))
        start += length
    return torch.cat(parts)

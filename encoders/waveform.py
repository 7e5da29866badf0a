"""Sound files as waveforms: one channel at 16 kHz, at most 30 seconds."""

import io
import math

import numpy as np
import soundfile
import soxr

SAMPLE_RATE = 16_000
"""Hz, after resampling."""
MAX_SAMPLES = 30 * SAMPLE_RATE
"""Longer sounds are cut to their first 30 seconds."""
_BLOCK = 65_536
"""Samples of every channel read at a time, so that many channels need little more memory than their mean."""
_MARGIN_SECONDS = 0.1
"""Read beyond the cut, so that resampling is not distorted by an end there."""


def resampled_length(samples: int, sample_rate: int) -> int:
    """Samples at 16 kHz of a sound: the ratio, rounded half up, as soxr does."""
    return (2 * samples * SAMPLE_RATE + sample_rate) // (2 * sample_rate)


def read_waveform(data: bytes) -> np.ndarray:
    """The first 30 seconds of a sound file as [samples] float32 at 16 kHz, the mean of its channels.

    Raises `ValueError`.
    """
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            rate = file.samplerate
            wanted = min(file.frames, math.ceil((MAX_SAMPLES / SAMPLE_RATE + _MARGIN_SECONDS) * rate))
            blocks = file.blocks(_BLOCK, frames=wanted, dtype="float32", always_2d=True)
            mono = [block.mean(axis=1) for block in blocks]
    except (RuntimeError, TypeError) as error:  # soundfile's own errors, and its complaint about headerless data
        raise ValueError(f"not a readable sound: {error}") from error
    waveform = np.concatenate(mono) if mono else np.zeros(0, np.float32)
    if len(waveform) < wanted:
        raise ValueError(f"the sound breaks off after {len(waveform)} of {wanted} samples")
    if not np.isfinite(waveform).all():
        raise ValueError("the sound holds samples that are not finite")
    if rate != SAMPLE_RATE:
        waveform = soxr.resample(waveform, rate, SAMPLE_RATE)
    return waveform[:MAX_SAMPLES]

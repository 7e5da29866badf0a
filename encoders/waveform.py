"""Sound files as waveforms: one channel at 16 kHz, at most 30 seconds."""

import io

import numpy as np
import soundfile
import soxr

SAMPLE_RATE = 16_000
"""Hz that sounds are resampled to."""
MAX_SAMPLES = 30 * SAMPLE_RATE
"""A longer sound is cut to its first 30 seconds."""


def resampled_length(samples: int, sample_rate: int) -> int:
    """Samples at 16 kHz of a sound: the ratio, rounded half up, as soxr does."""
    return (2 * samples * SAMPLE_RATE + sample_rate) // (2 * sample_rate)


def read_waveform(data: bytes) -> np.ndarray:
    """The first 30 seconds of a sound file as [samples] float32 at 16 kHz, the mean of its channels.

    Raises `ValueError`.
    """
    try:
        waveform, rate = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    except (RuntimeError, TypeError) as error:  # soundfile's own errors, and its complaint about headerless data
        raise ValueError(f"not a readable sound: {error}") from error
    mono = waveform.mean(axis=1)
    if not np.isfinite(mono).all():
        raise ValueError("the sound holds samples that are not finite")
    return (mono if rate == SAMPLE_RATE else soxr.resample(mono, rate, SAMPLE_RATE))[:MAX_SAMPLES]

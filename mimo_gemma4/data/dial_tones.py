"""Digits as the tones of a telephone's keypad: two sines per key, as in ITU-T recommendation Q.23."""

import io
from collections.abc import Sequence

import numpy as np
import soundfile

ROWS = (697, 770, 852, 941)
"""Frequencies of the keypad's rows in Hz, from the top."""
COLUMNS = (1209, 1336, 1477)
"""Frequencies of its columns in Hz, from the left."""
KEYPAD = ("123", "456", "789", "*0#")
SAMPLE_RATES = (8_000, 16_000)
"""Sample rates of the files in Hz: a telephone's, and Gemma 4's."""

_TONE_SECONDS = (0.08, 0.16)
_PAUSE_SECONDS = (0.04, 0.1)
"""Pause between two tones, before the first and after the last."""
_LEVEL_DECIBELS = (-30.0, -6.0)
"""Amplitude of a sine, relative to full scale."""
_TWIST_DECIBELS = 3.0
"""Largest difference between the two sines."""
_NOISE_DECIBELS = (-30.0, -10.0)
"""Standard deviation of the white noise, relative to a sine's amplitude."""


def dial(digits: Sequence[int], generator: np.random.Generator) -> bytes:
    """A WAV file in which `digits` are dialled, with durations, levels, noise and sample rate from `generator`."""
    rate = int(generator.choice(SAMPLE_RATES))
    level = 10 ** (generator.uniform(*_LEVEL_DECIBELS) / 20)
    parts = [_pause(rate, generator)]
    for digit in digits:
        parts += [_tone(digit, rate, generator), _pause(rate, generator)]
    waveform = np.concatenate(parts)
    waveform += 10 ** (generator.uniform(*_NOISE_DECIBELS) / 20) * generator.standard_normal(len(waveform))
    buffer = io.BytesIO()
    soundfile.write(buffer, np.clip(level * waveform, -1, 1), rate, format="WAV", subtype="PCM_16")
    return buffer.getvalue()


def frequencies(digit: int) -> tuple[int, int]:
    """Frequencies of the two sines of a digit's key, in Hz."""
    [(row, column)] = [(row, keys.index(str(digit))) for row, keys in enumerate(KEYPAD) if str(digit) in keys]
    return ROWS[row], COLUMNS[column]


def _tone(digit: int, rate: int, generator: np.random.Generator) -> np.ndarray:
    seconds = np.arange(int(rate * generator.uniform(*_TONE_SECONDS))) / rate
    twist = 10 ** (generator.uniform(-_TWIST_DECIBELS, _TWIST_DECIBELS) / 40)
    amplitudes, phases = (twist, 1 / twist), generator.uniform(0, 2 * np.pi, 2)
    low, high = (
        amplitude * np.sin(2 * np.pi * frequency * seconds + phase)
        for frequency, amplitude, phase in zip(frequencies(digit), amplitudes, phases, strict=True)
    )
    return np.asarray(low + high)


def _pause(rate: int, generator: np.random.Generator) -> np.ndarray:
    return np.zeros(int(rate * generator.uniform(*_PAUSE_SECONDS)))

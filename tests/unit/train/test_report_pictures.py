"""Pictures of samples in samples.png: the image as it is, a sound as its spectrogram, both side by side."""

import io

import numpy as np
import pytest
import soundfile

from mimo_gemma4.train.report import sample_picture
from tests.shard_maker import SoundProcessor, TileProcessor, chat, open_dataset, png, write_shard

RATE = 16_000


def tone(hertz: float) -> bytes:
    """Half a second of silence, then half a second of a sine."""
    seconds = np.arange(RATE // 2) / RATE
    buffer = io.BytesIO()
    soundfile.write(buffer, np.r_[np.zeros(RATE // 2), 0.5 * np.sin(2 * np.pi * hertz * seconds)], RATE, format="WAV")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    members = {
        "a.json": chat("q", "a", "image", "audio"), "a.0.png": png(16, 8, 200), "a.1.wav": tone(300),
        "b.json": chat("q", "b", "audio"), "b.0.wav": tone(3000),
        "c.json": chat("q", "c", "image"), "c.0.png": png(800, 8, 100),
        "d.json": chat("q", "d"),
    }  # fmt: skip
    shard = write_shard(tmp_path_factory.mktemp("pictures") / "shard.tar", members)
    return open_dataset([shard], TileProcessor(), SoundProcessor(), seq_length=1000)


def brightest_row(spectrogram: np.ndarray) -> int:
    return int(spectrogram[:, 3 * spectrogram.shape[1] // 4].argmax())


def test_image_and_sound_lie_side_by_side(dataset):
    picture = np.asarray(sample_picture(dataset, 0).convert("L"))
    assert picture.shape == (128, 256 + 128), "an image twice as wide as high, and a square"
    assert (picture[:, :256] == 200).all()


def test_time_runs_to_the_right_and_pitch_upwards(dataset):
    low = np.asarray(sample_picture(dataset, 0).convert("L"))[:, 256:]
    high = np.asarray(sample_picture(dataset, 1).convert("L"))
    for spectrogram in (low, high):
        assert spectrogram[:, 32].max() < 30 < 220 < spectrogram[:, 96].max()
    # HTK's mel scale: 300 Hz lies at 14% of 8 kHz, 3 kHz at 66%.
    assert brightest_row(low) / 128 == pytest.approx(1 - 0.14, abs=0.03)
    assert brightest_row(high) / 128 == pytest.approx(1 - 0.66, abs=0.03)


def test_wide_images_are_bounded_and_text_has_no_picture(dataset):
    assert sample_picture(dataset, 2).size == (512, 128)
    assert sample_picture(dataset, 3) is None

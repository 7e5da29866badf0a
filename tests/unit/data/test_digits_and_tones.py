"""The quickstart with sound: what is dialled can be heard, kinds come in turn, nothing held out is trained on."""

import io
import json
from collections import Counter

import numpy as np
import pytest
import soundfile

from mimo_gemma4.data import digits_and_tones
from mimo_gemma4.data.dial_tones import COLUMNS, KEYPAD, ROWS, dial
from mimo_gemma4.data.digits_and_tones import VALID_SAMPLES, WORDS, make_samples

KINDS = [(), ("png",), ("wav",), ("png", "wav")]


@pytest.fixture(scope="module")
def splits():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits_and_tones, "TRAIN_SAMPLES", 240)  # a tenth, for speed
        yield make_samples()


def media(sample):
    return tuple(sorted(key.partition(".")[2] for key in sample if key[0].isdigit()))


def turns(sample):
    question, answer = sample["json"]["messages"]
    return question["content"][-1]["text"], answer["content"][0]["text"]


def heard(file: bytes) -> str:
    """Digits in a sound: the strongest row and column of every loud window, a quiet one between two of them."""
    waveform, rate = soundfile.read(io.BytesIO(file))
    width, hop = rate // 30, rate // 200  # 33 ms separate the rows' frequencies and fit into the shortest pause
    windows = np.lib.stride_tricks.sliding_window_view(waveform, width)[::hop] * np.hanning(width)
    times = np.arange(width) / rate
    strength = {f: np.abs(windows @ np.exp(-2j * np.pi * f * times)) for f in (*ROWS, *COLUMNS)}
    rows, columns = (np.array([strength[f] for f in frequencies]) for frequencies in (ROWS, COLUMNS))
    both = np.minimum(rows.max(0), columns.max(0))
    keys = [KEYPAD[row][column] for row, column in zip(rows.argmax(0), columns.argmax(0), strict=True)]
    loud = both > 0.5 * both.max()
    starts = np.flatnonzero(loud & ~np.r_[False, loud[:-1]])
    ends = np.flatnonzero(loud & ~np.r_[loud[1:], False])
    return "".join(keys[(start + end) // 2] for start, end in zip(starts, ends, strict=True))


def test_what_is_dialled_is_heard():
    generator = np.random.default_rng(0)
    for digits in [[digit] for digit in range(10)] + generator.integers(10, size=(40, 2)).tolist() + [[7, 7]]:
        assert heard(dial(digits, generator)) == "".join(map(str, digits))


def test_sounds_vary_in_length_level_and_rate():
    generator = np.random.default_rng(1)
    sounds = [soundfile.read(io.BytesIO(dial([5], generator))) for _ in range(40)]
    seconds = [len(waveform) / rate for waveform, rate in sounds]
    levels = [np.abs(waveform).max() for waveform, _ in sounds]
    assert {rate for _, rate in sounds} == {8_000, 16_000}
    assert 0.16 <= min(seconds) < 0.22 and 0.28 < max(seconds) <= 0.36
    assert max(levels) > 8 * min(levels) and max(levels) <= 1


def test_kinds_come_in_turn_and_answers_name_their_digits(splits):
    for samples in splits:
        assert Counter(map(media, samples)) == dict.fromkeys(KINDS, len(samples) // 4)
        assert all(len({media(sample) for sample in samples[start : start + 4]}) == 4 for start in range(0, 40, 4))
        for sample in samples[:40]:
            question, answer = turns(sample)
            if media(sample) == ():
                assert question == f"{' '.join(WORDS[int(digit)] for digit in answer)}?"
            elif media(sample) == ("wav",):
                assert heard(sample["0.wav"]) == answer
            elif media(sample) == ("png", "wav"):
                assert heard(sample["1.wav"]) == answer[2]
    assert len(splits[1]) == 4 * VALID_SAMPLES


def test_no_held_out_sound_or_number_is_trained_on(splits):
    train, valid = splits
    for split, other in ((train, valid), (valid, train)):
        files = {sample[key] for sample in other for key in sample if key[0].isdigit()}
        assert not any(sample[key] in files for sample in split for key in sample if key[0].isdigit())
    spelled = [{turns(sample)[1] for sample in samples if media(sample) == ()} for samples in splits]
    assert len(spelled[1]) == VALID_SAMPLES and not spelled[0] & spelled[1]


def test_samples_are_always_the_same(splits, monkeypatch):
    monkeypatch.setattr(digits_and_tones, "TRAIN_SAMPLES", 240)
    assert json.dumps(make_samples(), default=bytes.hex) == json.dumps(splits, default=bytes.hex)

"""Sounds become the same features and soft tokens as in transformers, and damaged files are refused."""

import io
import random

import numpy as np
import pytest
import soundfile
import torch
from transformers.models.gemma4.feature_extraction_gemma4 import Gemma4AudioFeatureExtractor

from mimo_gemma4.data.chat import ConversationEncoder
from mimo_gemma4.data.loader import StepLoader
from mimo_gemma4.data.planner import StepPlanner
from mimo_gemma4.data.sample import read_header
from mimo_gemma4.data.tokenizer import byte_tokenizer
from mimo_gemma4.encoders.gemma4_audio_processor import Gemma4AudioProcessor, log_mel
from mimo_gemma4.encoders.registry import build_processor
from mimo_gemma4.encoders.waveform import read_waveform
from mimo_gemma4.errors import DataError
from mimo_gemma4.media import MediaHeader, MediaTokens
from tests.hf_processor import PilProcessor, saved_processor
from tests.shard_maker import chat, open_dataset, sound, write_shard

CONFIG = {
    "audio_config": dict(
        model_type="gemma4_audio",
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        subsampling_conv_channels=[128, 8],
        output_proj_dims=40,
    )
}
SECONDS = [0.1, 0.99, 1, 1.01, 29.99, 30, 45]
LENGTHS = [161, 162, 319, 320, 321, 480, 481, 640, 641, 800, 801, 961, *(round(16_000 * s) for s in SECONDS)]


@pytest.fixture(scope="module")
def processor() -> Gemma4AudioProcessor:
    return build_processor("audio", CONFIG)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> PilProcessor:
    return saved_processor(tmp_path_factory.mktemp("processor"))


def encode(waveform: np.ndarray, rate: int = 16_000, format: str = "WAV", subtype: str | None = "FLOAT") -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, waveform, rate, format=format, subtype=subtype)
    return buffer.getvalue()


def header_of(data: bytes, extension: str = "wav") -> MediaHeader:
    return read_header("audio", extension, io.BytesIO(b"before" + data + b"behind"), 6, len(data))


def clips() -> list[np.ndarray]:
    """Noise with a tone at levels from silence to clipping: the edge lengths, and random ones."""
    generator = np.random.default_rng(0)
    lengths = [*(length for length in LENGTHS if length < 100_000), *generator.integers(161, 60_000, 40)]
    tones = [0.5 * np.sin(np.arange(n) * generator.uniform(0, 3)) for n in lengths]
    noise = [generator.standard_normal(n) * 10 ** generator.uniform(-6, 0) for n in lengths]
    quiet = [np.zeros(5000), np.full(333, 1.0)]
    return [clip.astype(np.float32) for clip in (*map(np.add, tones, noise), *quiet)]


def test_features_equal_transformers(processor: Gemma4AudioProcessor):
    extractor, sounds = Gemma4AudioFeatureExtractor(), clips()
    assert len(sounds) >= 50
    for waveform in sounds:
        expected = extractor([waveform], return_tensors="pt")
        frames = expected["input_features"][0][expected["input_features_mask"][0]]
        data = encode(waveform)
        features = processor.decode(data)["features"]
        # fp32 here, fp64 from the magnitudes on there: a few roundings of logarithms between -7 and 5.
        torch.testing.assert_close(features, frames, rtol=0, atol=1e-5)
        header = header_of(data)
        assert processor.placeholder(header)["features"].shape == features.shape
        assert len(features) == processor.frames(header)


def test_silence_stands_in_for_a_damaged_file(processor: Gemma4AudioProcessor):
    silence = encode(np.zeros(4000, np.float32))
    expected = processor.decode(silence)["features"]
    torch.testing.assert_close(processor.placeholder(header_of(silence))["features"], expected)


@pytest.mark.parametrize("length", LENGTHS)
def test_expanded_ids_equal_those_of_transformers(
    length: int, processor: Gemma4AudioProcessor, reference: PilProcessor
):
    waveform = np.random.default_rng(length).uniform(-1, 1, length).astype(np.float32)
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "say "}, {"type": "audio"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "what it says"}]},
    ]
    encoder = ConversationEncoder(byte_tokenizer(), [processor], {"audio": MediaTokens(8, 9, 10)})
    text, _ = encoder.template.answers(messages)
    expected = reference(text=[text], audio=[waveform], add_special_tokens=False)
    count = processor.soft_tokens(MediaHeader(samples=length, sample_rate=16_000))
    encoded = encoder.encode(messages, [count])
    assert encoded.input_ids.tolist() == expected["input_ids"][0]
    types = np.array(expected["mm_token_type_ids"][0])
    start = encoded.media_starts[0]
    assert np.flatnonzero(types == 3).tolist() == list(range(start, start + count))
    assert (encoded.labels[start - 2 : start + count] == -100).all()  # neither begin, soft nor end tokens are learned
    assert len(processor.decode(encode(waveform))["features"]) == expected["input_features_mask"][0].sum()


def test_a_sound_is_resampled_to_16_khz(processor: Gemma4AudioProcessor):
    """A tone has the features of the same tone sampled at 16 kHz, away from the ends and from bands without sound."""
    for rate in (8_000, 11_025, 22_050, 44_100, 48_000, 96_000):
        tone = {r: (0.5 * np.sin(2 * np.pi * 1234 * np.arange(r) / r)).astype(np.float32) for r in (rate, 16_000)}
        features, expected = (processor.decode(encode(tone[r], r))["features"][5:90] for r in (rate, 16_000))
        loud = expected > 0
        assert loud.any()
        torch.testing.assert_close(features[loud], expected[loud], rtol=0, atol=1e-2)


def test_soft_tokens_are_known_from_the_header_at_any_rate(processor: Gemma4AudioProcessor):
    choose = random.Random(0)
    for _ in range(100):
        rate = choose.choice([8_000, 11_025, 12_345, 16_000, 22_050, 44_100, 48_000])
        data = encode(np.zeros(choose.randrange(rate // 50, rate), np.float32), rate, "FLAC", "PCM_16")
        assert len(processor.decode(data)["features"]) == processor.frames(header_of(data, "flac"))
    for rate in (8_000, 44_100):  # cut to 30 seconds
        data = encode(np.zeros(31 * rate, np.float32), rate, "FLAC", "PCM_16")
        header = header_of(data, "flac")
        assert (len(processor.decode(data)["features"]), processor.soft_tokens(header)) == (2999, 750)


def test_what_lies_beyond_30_seconds_changes_nothing(processor: Gemma4AudioProcessor):
    waveform = np.random.default_rng(1).uniform(-1, 1, 45 * 16_000).astype(np.float32)
    features = processor.decode(encode(waveform))["features"]
    assert torch.equal(features, torch.from_numpy(log_mel(waveform[: 30 * 16_000])))


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE"])
def test_channels_are_averaged_in_any_sample_format(subtype: str):
    left, right = np.random.default_rng(2).uniform(-0.5, 0.5, (2, 8_000))
    stereo = encode(np.stack([left, right], axis=1), subtype=subtype)
    assert header_of(stereo) == MediaHeader(samples=8_000, sample_rate=16_000)
    step = {"PCM_U8": 2**-7, "PCM_16": 2**-15, "PCM_24": 2**-23}.get(subtype, 2**-24)  # of the format, or of fp32
    np.testing.assert_allclose(read_waveform(stereo), (left + right) / 2, rtol=0, atol=step)


def damaged_files() -> dict[str, bytes]:
    waveform = np.random.default_rng(3).uniform(-1, 1, 20_000).astype(np.float32)
    wave, flac = encode(waveform, subtype="PCM_16"), encode(waveform, format="FLAC", subtype="PCM_16")
    return {
        "no bytes": b"",
        "text": b"no sound at all",
        "header alone": wave[:30],
        "no samples": encode(waveform[:0]),
        "less than a window": encode(waveform[:160]),
        "not a number": encode(np.full(1000, np.nan, np.float32)),
        "FLAC cut short": flac[: len(flac) // 2],
        "FLAC overwritten": flac[:9_000] + bytes(500) + flac[9_500:],
    }


@pytest.mark.parametrize("name", damaged_files())
def test_damaged_files_raise_value_error(name: str, processor: Gemma4AudioProcessor):
    with pytest.raises(ValueError):
        processor.decode(damaged_files()[name])


@pytest.mark.parametrize(("samples", "rate"), [(0, 16_000), (160, 16_000), (80, 8_000), (100, 0)])
def test_sounds_without_a_token_are_refused(samples: int, rate: int, processor: Gemma4AudioProcessor):
    with pytest.raises(ValueError, match=f"sound of {samples} samples at {rate} Hz"):
        processor.soft_tokens(MediaHeader(samples=samples, sample_rate=rate))


@pytest.mark.parametrize("policy", ["skip", "fail"])
def test_a_sound_that_turns_out_damaged_is_a_bad_sample(policy: str, processor: Gemma4AudioProcessor, tmp_path):
    good = sound(8_000, 1, format="FLAC")
    bad = bytearray(sound(12_000, 2, format="FLAC"))
    bad[3_000:3_200] = bytes(200)
    members = {"a.json": chat("q", "a", "audio"), "a.0.flac": good, "b.json": chat("q", "b", "audio")}
    shard = write_shard(tmp_path / "a.tar", members | {"b.0.flac": bytes(bad)})
    dataset = open_dataset(shard, processor)
    planner = StepPlanner(
        dataset,
        global_batch_size=2,
        microbatch_size=2,
        seed=0,
        language_lanes=1,
        encoder_lanes={"audio": 1},
        packing=False,
        shuffle=False,
    )
    loader = StepLoader(
        planner, language_lane=0, encoder_lanes={"audio": 0}, on_bad_sample=policy, max_bad_fraction=0.5, prefetch=0
    )
    if policy == "fail":
        with pytest.raises(DataError, match=r"__key__ 'b': media 0 \(audio\): not a readable sound"):
            loader.load(0)
        return
    data = loader.load(0)
    assert [planned.index for planned in data.manifest.samples] == [0, 0]  # the good sound stands in
    assert [(sample.key, sample.fault) for sample in loader.bad.values()] == [("b", "audio")]
    assert data.media["audio", 0]["sounds"].bincount().tolist() == [13, 13]  # soft tokens of half a second

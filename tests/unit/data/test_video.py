"""Videos are frames: named, counted, sampled, timed and expanded to ids as transformers does."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from transformers.video_utils import VideoMetadata, default_sample_indices_fn

from mimo_gemma4.data.chat import ConversationEncoder
from mimo_gemma4.data.dataset import ShardDataset
from mimo_gemma4.data.sample import parse_messages
from mimo_gemma4.data.tokenizer import byte_tokenizer, load_tokenizer
from mimo_gemma4.encoders.gemma4_vision_processor import Gemma4FrameProcessor, Gemma4ImageProcessor
from mimo_gemma4.media import MediaHeader, MediaTokens
from tests.hf_processor import saved_processor
from tests.shard_maker import png, write_shard

TOKENS = {"image": MediaTokens(5, 6, 7), "video": MediaTokens(5, 11, 7)}


def encoder(tokenizer=None, num_frames: int = 4) -> ConversationEncoder:
    processors = [
        Gemma4ImageProcessor(max_soft_tokens=8),
        Gemma4FrameProcessor(max_soft_tokens=4, num_frames=num_frames),
    ]
    return ConversationEncoder(tokenizer or byte_tokenizer(), processors, TOKENS)


def conversation(*parts: dict, answer: str = "Ja!") -> list[dict]:
    messages = [{"role": "user", "content": list(parts)}, {"role": "assistant", "content": answer}]
    return parse_messages(json.dumps({"messages": [*messages, *messages[:1], messages[1]]}).encode())


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def video(frames: int, fps: float) -> dict:
    return {"type": "video", "frames": frames, "fps": fps}


@pytest.mark.parametrize("frames", [1, 2, 31, 32, 33, 100, 1023])
def test_sampled_frames_are_those_of_transformers(frames: int):
    wanted = min(frames, 32)  # transformers refuses a video of fewer frames than it is asked for
    expected = default_sample_indices_fn(VideoMetadata(total_num_frames=frames, fps=24), num_frames=wanted)
    assert Gemma4FrameProcessor().sample(frames) == expected.tolist()


@pytest.mark.parametrize(("frames", "fps"), [(3, 1), (9, 0.5), (12, 29.97), (7000, 1), (4, 0.001)])
def test_ids_types_and_labels(tmp_path: Path, frames: int, fps: float):
    reference = saved_processor(tmp_path)
    encode = encoder(load_tokenizer(tmp_path))
    messages = conversation(text("12"), video(frames, fps), text("34 "), {"type": "image"}, video(2, 2), answer="Ja ☃")
    frame_processor = encode.processors["video"]
    expanded = reference.tokenizer.apply_chat_template(messages, tokenize=False)
    for part in (video(frames, fps), video(2, 2)) * 2:
        metadata = VideoMetadata(total_num_frames=part["frames"], fps=part["fps"])
        metadata.frames_indices = frame_processor.sample(part["frames"])
        inputs = {"num_soft_tokens_per_video": [3], "video_metadata": [metadata]}
        expanded = expanded.replace("<|video|>", reference.replace_video_token(inputs, 0).replace("video", "VIDEO"), 1)
    expanded = expanded.replace("VIDEO", "video").replace("<|image|>", "<|image>" + 5 * "<|image|>" + "<image|>")
    expected = reference.tokenizer(expanded, add_special_tokens=False)["input_ids"]

    sampled = len(frame_processor.sample(frames))
    soft_tokens = 2 * [*[3] * sampled, 5, 3, 3]
    assert len(encode.shown_media(messages)) == len(soft_tokens)
    encoded = encode.encode(messages, soft_tokens)
    assert encoded.input_ids.tolist() == expected
    types = np.zeros(encoded.length, np.int64)
    for start, count in zip(encoded.media_starts, soft_tokens, strict=True):
        types[start : start + count] = 1 if count == 5 else 2
    np.testing.assert_array_equal(types, reference.create_mm_token_type_ids([expected])[0])
    assert encode.tokenizer.decode(encoded.labels[encoded.labels != -100]) == "Ja ☃<turn|>Ja ☃<turn|>"


def members(key: str, frames: dict[int, list[int]], messages: list[dict]) -> dict[str, bytes]:
    """A sample whose videos, by number, have frames of these numbers, each of its own height."""
    files = {f"{key}.json": json.dumps({"messages": messages}).encode()}
    for number, names in frames.items():
        for name in reversed(names):  # their order in the tar does not matter
            files[f"{key}.{number}.{name:04d}.png"] = png(8, 8 * (1 + name), shade=name)
    return files


def test_frames_are_read_by_number_and_only_sampled_ones_are_shown(tmp_path: Path):
    messages = conversation(video(6, 1), text("?"), video(2, 1))[:2]
    shard = write_shard(tmp_path / "a.tar", members("s", {0: range(1, 7), 1: range(2)}, messages))
    dataset = ShardDataset.open(shard, encoder(), seq_length=512)
    media = dataset.media(0)
    assert [item.media_type for item in media] == ["video"] * 6
    assert [item.header for item in media] == [MediaHeader(8, 8 * (1 + name)) for name in (1, 2, 4, 5, 0, 1)]
    encoded = dataset.encode(0)
    assert encoded.media_starts == tuple(item.start for item in media)
    assert all((encoded.input_ids[item.start : item.start + item.soft_tokens] == 11).all() for item in media)


@pytest.mark.parametrize(
    ("frames", "parts", "reason"),
    [
        ({0: [0, 1]}, [video(3, 1)], "name 0 image, 0 audio, 3 video frames, but its members"),
        (
            {0: [0, 1, 2], 1: [0]},
            [video(2, 1), video(2, 1)],
            r"videos of \[2, 2\] frames, but its members hold \[3, 1\]",
        ),
        ({0: [0]}, [{"type": "video"}], "neither text nor typed parts"),
        ({0: [0]}, [video(1, 0)], "neither text nor typed parts"),
        ({0: [0]}, [video(10**12, 1)], "neither text nor typed parts"),
        ({0: [0]}, [video(1, 1e-320)], "neither text nor typed parts"),
    ],
)
def test_videos_that_are_not_whole_are_named(tmp_path: Path, frames: dict, parts: list[dict], reason: str):
    good = conversation(text("?"))[:2]
    bad = [{"role": "user", "content": parts}, good[1]]
    shard = write_shard(tmp_path / "a.tar", members("bad", frames, bad) | members("good", {}, good))
    dataset = ShardDataset.open(shard, encoder(), seq_length=512, on_bad_sample="skip", max_bad_fraction=0.5)
    (excluded,) = dataset.unusable
    assert excluded.key == "bad"
    assert re.search(reason, excluded.reason), excluded.reason

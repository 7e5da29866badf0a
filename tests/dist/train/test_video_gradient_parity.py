"""A step on videos and images has the loss and gradients of transformers, every frame attending to itself both ways."""

import json
from pathlib import Path

import numpy as np

from tests.dist.train.step_parity import SHARD, Case, check, prepare, write_config
from tests.shard_maker import jpeg, write_shard
from tests.vlm_reference import write_model

VIDEOS = [[6], [], [1, 3], [2], [], [9], [4], [5, 1], [], [3]]
"""Frames of the videos of every sample; at most four of a video are shown."""


def write(folder: Path) -> None:
    config_file = write_model(folder / "model") / "config.json"
    hf_config = json.loads(config_file.read_text())
    hf_config["text_config"]["use_bidirectional_attention"] = "vision"
    hf_config["vision_processor"] |= {"max_frame_tokens": 3, "num_frames": 4}
    config_file.write_text(json.dumps(hf_config))
    write_shard(folder / SHARD, samples())
    write_config(folder)


def samples() -> dict[str, bytes]:
    """Ten samples of ragged text, each with an image unless it is the second, and the videos of `VIDEOS`."""
    generator = np.random.default_rng(5)
    members: dict[str, bytes] = {}
    for number, videos in enumerate(VIDEOS):
        question = "".join(generator.choice(list("abcdef "), generator.integers(3, 30)))
        parts = [{"type": "video", "frames": frames, "fps": 0.1} for frames in videos]
        parts += [{"type": "text", "text": question}] + [{"type": "image"}] * (number != 1)
        messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": f"{number}!"}]
        members[f"s{number}.json"] = json.dumps({"messages": messages}).encode()
        for video, frames in enumerate(videos):
            for frame in range(frames):
                members[f"s{number}.{video}.{frame}.jpg"] = jpeg(50 + 30 * number, 60, shade=20 * frame + number)
        if number != 1:
            members[f"s{number}.jpg"] = jpeg(90, 40 + 20 * number, shade=number)
    return members


def test_step_gradients(tmp_path: Path) -> None:
    prepared = prepare(tmp_path, write)
    assert set().union(*prepared.media) == {"image", "video"}
    check([(Case(vision=2), prepared)])

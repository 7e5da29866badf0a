"""A step on videos and images has the loss and gradients of transformers, every frame attending to itself both ways."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.dist.harness import run_ranks
from tests.dist.test_step_gradient_parity import BATCH, SEED, STEP, step_on_rank, worst_gradient
from tests.shard_maker import jpeg, write_shard
from tests.vlm_reference import huggingface_step, write_model

VIDEOS = [[6], [], [1, 3], [2], [], [9], [4], [5, 1], [], [3]]
"""Frames of the videos of every sample; at most four of a video are shown."""


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    config_file = write_model(tmp_path / "model") / "config.json"
    hf_config = json.loads(config_file.read_text())
    hf_config["text_config"]["use_bidirectional_attention"] = "vision"
    hf_config["vision_processor"] |= {"max_frame_tokens": 3, "num_frames": 4}
    config_file.write_text(json.dumps(hf_config))
    write_shard(tmp_path / "train-000000.tar", samples())
    (tmp_path / "run.yaml").write_text(
        f"""
        run: {{dir: {tmp_path}/run, seed: {SEED}}}
        model: {{hf_path: {tmp_path}/model, precision: fp32}}
        layout: {{vision: {{ranks: 2}}, language: {{ranks: 1}}}}
        data: {{train: {{shards: "{tmp_path}/train-000000.tar"}}, seq_length: 300}}
        train: {{global_batch_size: {BATCH}, microbatch_size: 2}}
        logging: {{tensorboard: false}}
        """
    )
    return tmp_path


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


def reference_rank(rank: int, folder: Path):  # noqa: ANN201
    return huggingface_step(folder / "model", folder / "train-000000.tar", STEP, BATCH, SEED)


def test_step_gradients(run_folder: Path):
    reference = run_ranks(1, reference_rank, run_folder)[0]
    results = run_ranks(3, step_on_rank, run_folder, [])
    outcome = results[0][0]
    assert outcome["hashes"] == 0
    assert outcome["loss_tokens"] == reference.loss_tokens
    assert outcome["loss"] == pytest.approx(reference.loss, rel=1e-5)
    ratio, name = worst_gradient(results, reference)
    assert ratio <= 1.0, f"{name} deviates by {ratio:.2f} times its tolerance"

"""The inspection of a shard shows its samples as a training sees them."""

import json

import pytest

from mimo_gemma4.config import ModelConfig
from mimo_gemma4.config.presets import load_model_config
from mimo_gemma4.data.dataset import ShardDataset
from mimo_gemma4.data.inspect import build_encoder, main
from tests.hf_processor import saved_processor
from tests.shard_maker import chat, png, write_shard


@pytest.fixture
def shard(tmp_path):
    return write_shard(
        tmp_path / "a.tar",
        {
            **{"first.json": chat("What is\x1b[31m this?", "A lamp.", "image"), "first.0.png": png(100, 60, 1)},
            **{"second.json": chat("Hello", "Hi")},
            **{"torn.json": b"{", "silent.json": json.dumps({"messages": [{"role": "user", "content": "x"}]}).encode()},
        },
    )


def test_samples_are_shown_as_they_are_trained_on(shard, capsys):
    assert main([str(shard), "--preset", "gemma4_tiny"]) == 0
    lines = capsys.readouterr().out.splitlines()
    encoder = build_encoder(ModelConfig(preset="gemma4_tiny"))
    dataset = ShardDataset.open(shard, encoder, seq_length=512, on_bad_sample="skip", max_bad_fraction=1.0)
    encoded, soft_tokens = dataset.encode(0), dataset.media(0)[0].soft_tokens
    text = "\n".join(lines)
    assert "── first · sample 1 of 3" in text and "── second · sample 2 of 3" in text
    counts = f"{encoded.length} tokens: {encoded.length - soft_tokens} text, {soft_tokens} media"
    assert f"{counts}; {encoded.loss_tokens} with loss" in text
    [member] = [line.split() for line in lines if line.startswith("first.0.png")]
    assert member[1:3] == [str(len(png(100, 60, 1))), "bytes"]
    assert member[3:] == ["100", "×", "60", "pixels", str(soft_tokens), "soft", "tokens"]
    assert "»A lamp.<turn|>«" in text and "<|image|>What is�[31m this?<turn|>" in text and "\x1b" not in text
    assert encoded.loss_tokens == len("A lamp.") + 1  # the built-in tokenizer has a token per byte


def test_a_model_directory_counts_with_its_own_files(shard, tmp_path, capsys):
    saved_processor(tmp_path / "model", max_soft_tokens=70)
    ids = {"boi_token_id": 5, "image_token_id": 6, "eoi_token_id": 7, "video_token_id": None}
    config = load_model_config(ModelConfig(preset="gemma4_e4b")) | ids
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    assert main([str(shard), "--hf-path", str(tmp_path / "model"), "--samples", "1"]) == 0
    output = capsys.readouterr().out
    assert f"counted with {tmp_path}/model" in output
    assert "60 soft tokens" in output  # 100 × 60 pixels: 10 across, 6 down
    assert main([str(shard), "--preset", "gemma4_e4b", "--samples", "1"]) == 0
    assert "252 soft tokens" in capsys.readouterr().out  # 21 across, 12 down


def test_unusable_samples_and_percentiles(shard, capsys):
    assert main([str(shard), "--preset", "gemma4_tiny", "--samples", "0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    text = "\n".join(lines)
    assert "── 2 unusable" in text
    assert "json: __key__ 'torn': its JSON cannot be read" in text
    assert "chat: __key__ 'silent': the conversation has no answer" in text
    table = {line.strip().rsplit(maxsplit=8)[0]: line.split()[-8:] for line in lines if line.startswith(" ")}
    assert table["with loss"] == ["2", "3", "3", "3", "8", "8", "8", "11"]
    assert table["width of one image"] == ["1", *["100"] * 7] and table["height of one image"] == ["1", *["60"] * 7]
    assert "first ·" not in text


def test_a_sample_can_be_asked_for_by_key(shard, capsys):
    assert main([str(shard), "--preset", "gemma4_tiny", "--key", "second"]) == 0
    output = capsys.readouterr().out
    assert "── second · sample 2 of 3" in output and "»Hi<turn|>«" in output and "first" not in output


@pytest.mark.parametrize(
    ("options", "reason"),
    [(["--preset", "gemma5"], "no preset `gemma5`"), (["--hf-path", "/none"], "/none has no config.json")],
)
def test_a_model_that_is_not_there_is_an_error(shard, capsys, options, reason):
    assert main([str(shard), *options]) == 2
    assert reason in capsys.readouterr().err
    assert main([f"{shard}.none"]) == 2
    assert "do not exist" in capsys.readouterr().err

"""A Hugging Face directory that goes through a checkpoint comes back with the same tensors, bit for bit, and files."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForImageTextToText, Gemma4ForCausalLM

from mimo_gemma4.convert.__main__ import main
from mimo_gemma4.weights import safetensors_rows
from mimo_gemma4.weights.huggingface import HuggingFaceSource
from tests import REPOSITORY
from tests.huggingface_models import COMPANIONS, VARIANTS, same_bits, stored_tensors, write_variant


def round_trip(source: Path, folder: Path, *options: str) -> Path:
    assert main(["from-hf", str(source), str(folder / "checkpoint"), "--max-shard-size", "300KB"]) == 0
    assert main(["to-hf", str(folder / "checkpoint"), str(folder / "back"), *options]) == 0
    return folder / "back"


def beside_weights(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix != ".safetensors" and "index" not in p.name}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_comes_back_bit_for_bit(tmp_path: Path, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_rows, "PIECE_BYTES", 1000)  # most tensors take many pieces
    source = write_variant(tmp_path / "source", variant)
    back = round_trip(source, tmp_path, "--max-shard-size", "200KB")
    assert len(list(source.glob("*.safetensors"))) > 10
    assert len(list((tmp_path / "checkpoint").glob("*.safetensors"))) >= 5
    assert len(list(back.glob("*.safetensors"))) >= 8
    assert same_bits(stored_tensors(source), stored_tensors(back))
    assert beside_weights(source) == beside_weights(back)
    assert {*COMPANIONS, "config.json", "tokenizer.json", "chat_template.jinja"} <= beside_weights(back).keys()
    for file in back.glob("*.safetensors"):
        with safe_open(file, framework="pt") as handle:
            assert handle.metadata() == {"format": "pt"}
            sizes = [handle.get_tensor(name).nbytes for name in handle.keys()]
        assert sum(sizes) <= 200_000 or len(sizes) == 1
    _, loading = AutoModelForImageTextToText.from_pretrained(back, output_loading_info=True)
    assert not any(loading.values()), loading


def rewrite(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Replace the weights by one file that holds `tensors`."""
    for file in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
        file.unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_the_tied_head_is_dropped_and_dead_keys_are_kept(tmp_path: Path) -> None:
    source = write_variant(tmp_path / "source", "e2b")
    tensors = stored_tensors(source)
    dead = {
        f"model.language_model.layers.5.self_attn.{n}.weight": torch.randn(3).bfloat16() for n in ("k_proj", "k_norm")
    }
    counts = {"model.counts": torch.arange(3), "model.flag": torch.tensor(True)}
    head = {"lm_head.weight": tensors["model.language_model.embed_tokens.weight"].clone()}
    rewrite(source, tensors | dead | counts | head)
    assert same_bits(tensors | dead | counts, stored_tensors(round_trip(source, tmp_path)))


def test_float_types_follow_the_option(tmp_path: Path) -> None:
    source = write_variant(tmp_path / "source", "e4b")
    tensors = stored_tensors(source) | {"model.counts": torch.arange(3)}
    rewrite(source, tensors)
    back = round_trip(source, tmp_path, "--dtype", "fp32")
    expected = {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}
    assert same_bits(expected, stored_tensors(back))
    config = json.loads((back / "config.json").read_text())
    assert config["dtype"] == "float32"


def test_text_only_names_come_back_and_are_known_as_those_of_the_whole_model(tmp_path: Path) -> None:
    whole = write_variant(tmp_path / "whole", "e2b")
    source = tmp_path / "source"
    config = AutoConfig.from_pretrained(whole).text_config
    Gemma4ForCausalLM(config).bfloat16().save_pretrained(source)
    names = stored_tensors(source).keys()
    known = HuggingFaceSource(source).tensors
    language = {name for name in stored_tensors(whole) if name.startswith("model.language_model.")}
    assert known.keys() == language
    assert {stored.name for stored in known.values()} == names
    assert same_bits(stored_tensors(source), stored_tensors(round_trip(source, tmp_path)))


@pytest.mark.parametrize("prefix", ["language_model.model.", "language_model.", "model.", ""])
def test_older_prefixes_are_translated(tmp_path: Path, prefix: str) -> None:
    language = {"embed_tokens.weight": torch.ones(2, 2), "layers.0.layer_scalar": torch.ones(1)}
    towers = {} if prefix in ("model.", "") else {"vision_tower.std_bias": torch.ones(1)}
    head = "language_model.lm_head.weight" if prefix == "language_model.model." else "lm_head.weight"
    (tmp_path / "old").mkdir()
    stored = {prefix + name: tensor for name, tensor in language.items()} | towers | {head: torch.ones(2, 2)}
    rewrite(tmp_path / "old", stored)
    expected = {f"model.language_model.{name}" for name in language} | {f"model.{name}" for name in towers}
    assert HuggingFaceSource(tmp_path / "old").tensors.keys() == expected


def failure(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == 1
    return capsys.readouterr().err


def test_mistakes_are_typed_and_leave_nothing_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_variant(tmp_path / "source", "31b", max_shard_size="1GB")
    assert "exists and is not overwritten" in failure(capsys, "from-hf", source, source)
    assert "no such folder" in failure(capsys, "to-hf", tmp_path / "none", tmp_path / "out")
    assert main(["from-hf", str(source), str(tmp_path / "checkpoint")]) == 0
    weights = tmp_path / "checkpoint" / "weights_00000.safetensors"
    intact = weights.read_bytes()
    weights.write_bytes(intact[:-1] + bytes([intact[-1] ^ 1]))
    assert "was changed after it was written" in failure(capsys, "to-hf", tmp_path / "checkpoint", tmp_path / "out")
    weights.write_bytes(intact[:-1])
    assert "bytes where complete.json lists" in failure(capsys, "to-hf", tmp_path / "checkpoint", tmp_path / "out")
    (source / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes()[:-10])
    assert "where its header announces" in failure(capsys, "from-hf", source, tmp_path / "out")
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    assert "pytorch_model.bin" in failure(capsys, "from-hf", source, tmp_path / "out")
    (source / "pytorch_model.bin").unlink()
    assert "holds neither" in failure(capsys, "from-hf", source, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "source"]


def test_a_failure_while_writing_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_variant(tmp_path / "source", "31b")

    def fail(*arguments: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("mimo_gemma4.convert.conversion.copy_model_files", fail)
    assert "no space left" in failure(capsys, "from-hf", source, tmp_path / "checkpoint")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


MEGABYTE = 10**6
TENSOR_BYTES, SHARD_BYTES, TENSORS = 16 * MEGABYTE, 48 * MEGABYTE, 20


def write_many_files(folder: Path, tensors: int, per_file: int) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "gemma4", "text_config": {}}')
    names = [f"model.language_model.layers.{number}.weight" for number in range(tensors)]
    weight_map: dict[str, str] = {}
    for first in range(0, tensors, per_file):
        held = {name: torch.randn(1000, TENSOR_BYTES // 2000).bfloat16() for name in names[first : first + per_file]}
        save_file(held, folder / f"{first}.safetensors")
        weight_map |= dict.fromkeys(held, f"{first}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_memory_stays_below_a_tensor_and_a_file(tmp_path: Path) -> None:
    small = write_many_files(tmp_path / "few", 2, 1)
    large = write_many_files(tmp_path / "many", TENSORS, SHARD_BYTES // TENSOR_BYTES)
    command = [sys.executable, "-m", "tests.conversion_memory", *map(str, (small, large, tmp_path, SHARD_BYTES))]
    output = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=200, check=True).stdout
    growth = json.loads(output.splitlines()[-1])
    assert max(growth) < TENSOR_BYTES + SHARD_BYTES < TENSORS * TENSOR_BYTES / 4
    assert len(list((tmp_path / "large/back").glob("*.safetensors"))) == -(-TENSORS * TENSOR_BYTES // SHARD_BYTES)

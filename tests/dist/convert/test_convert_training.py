"""Training starts from a Hugging Face directory or its checkpoint alike, and what it trained goes back to that form."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
)

from mimo_gemma4.config import load_config
from mimo_gemma4.convert.__main__ import main
from mimo_gemma4.data.tokenizer import byte_tokenizer
from mimo_gemma4.errors import CheckpointError
from mimo_gemma4.optim.module_optimizer import ModuleOptimizer
from mimo_gemma4.train.build import build_model, build_modules
from mimo_gemma4.train.initial_weights import StartCheckpoint, fill_weights, find_start_checkpoint, restore
from mimo_gemma4.train.setup import RunSetup, set_up_run
from tests.checkpoint_reader import whole_tensors
from tests.dist.harness import run_ranks
from tests.e2e.training_runs import Outcome, step_records, train_on_rank, write_config
from tests.huggingface_models import TINY, same_bits, stored_tensors, write_variant
from tests.shard_maker import chat, jpeg, write_shard

TP2 = {"language": {"ranks": 2, "tp": 2}}
EP2 = {"language": {"ranks": 2, "ep": 2}}
TOGETHER_TP1 = {"language": {}, "vision": {}, "placement": "colocated"}
TOGETHER = {"language": {"tp": 2}, "vision": {}, "placement": "colocated"}
APART = {"vision": {"ranks": 1}, "language": {"ranks": 1}}
LANGUAGE = "model.language_model."


def setup(arguments: list[str]) -> RunSetup:
    return set_up_run(load_config(arguments))


def loaded_wrongly(rank: int, arguments: list[str], source: Path) -> list[str]:
    """Bindings that do not hold what the files of `source` hold there, after either way of loading."""
    base = setup(arguments)
    tensors = stored_tensors(source)
    wrong: list[str] = []
    start = find_start_checkpoint(base)
    model = build_modules(base)
    if start is None:
        fill_weights(base, model)
    else:
        assert start == StartCheckpoint(Path(str(base.config.checkpoint.init_from)), weights_only=True)
        optimizers = {
            n: ModuleOptimizer(m, base.groups.modules[n], base.config.optim) for n, m in model.modules.items()
        }
        assert restore(base, start, optimizers) == 0
    for module in model.modules.values():
        for binding in module.bindings():
            if not torch.equal(binding.view(), tensors[binding.name][binding.index]):
                wrong.append(binding.name)
    return wrong


@pytest.mark.parametrize(
    ("variant", "layout"),
    [("e2b", TOGETHER), ("e4b", APART), ("12b", TP2), ("26b_a4b", EP2), ("31b", TOGETHER)],
)
def test_every_rank_holds_its_slices_from_either_form(tmp_path: Path, variant: str, layout: dict) -> None:
    source, checkpoint = write_variant(tmp_path / "source", variant), tmp_path / "checkpoint"
    assert main(["from-hf", str(source), str(checkpoint), "--max-shard-size", "300KB"]) == 0
    for number, (path, start) in enumerate([(source, "null"), (checkpoint / "huggingface", checkpoint)]):
        folder = tmp_path / str(number)
        folder.mkdir()
        config = write_config(
            folder, tmp_path / "none", layout=layout, model={"hf_path": str(path), "precision": "bf16"}
        )
        assert run_ranks(2, loaded_wrongly, [config, f"checkpoint.init_from={start}"], source) == [[], []]


def write_text_only(source: Path) -> Path:
    """A `Gemma4ForCausalLM` with the keys of a layer that shares those of another."""
    text = {key: value for key, value in TINY["text_config"].items() if key != "model_type"}
    Gemma4ForCausalLM(Gemma4TextConfig(**text)).bfloat16().save_pretrained(source)
    byte_tokenizer().save_pretrained(str(source))
    dead = {"model.layers.5.self_attn.k_proj.weight": torch.zeros(2, 2)}
    save_file(stored_tensors(source) | dead, source / "model.safetensors", metadata={"format": "pt"})
    return source


def test_a_text_only_directory_loads_into_the_language_module(tmp_path: Path) -> None:
    source = write_text_only(tmp_path / "source")
    config = write_config(tmp_path, tmp_path / "none", layout=TP2, model={"hf_path": str(source), "precision": "bf16"})
    assert run_ranks(2, first_tensors, [config], source) == [[], []]


def first_tensors(rank: int, arguments: list[str], source: Path) -> list[str]:
    base = setup(arguments)
    model = build_model(base)
    tensors = stored_tensors(source)
    bindings = [binding for module in model.modules.values() for binding in module.bindings()]
    assert bindings
    return [b.name for b in bindings if not torch.equal(b.view(), tensors[b.name.replace(LANGUAGE, "model.")][b.index])]


def refusal(rank: int, arguments: list[str]) -> str:
    base = setup(arguments)
    with pytest.raises(CheckpointError) as caught:
        build_model(base)
    return str(caught.value)


def test_one_error_on_every_rank_lists_all_that_does_not_fit(tmp_path: Path) -> None:
    source = write_variant(tmp_path / "source", "e2b", max_shard_size="1GB")
    tensors = stored_tensors(source)
    layer = f"{LANGUAGE}layers.5."
    gone = [f"{layer}mlp.up_proj.weight", "model.vision_tower.patch_embedder.input_proj.weight"]
    for name in gone:
        del tensors[name]
    tensors[f"{layer}mlp.gate_proj.weight"] = torch.zeros(3, 4, dtype=torch.bfloat16)
    tensors["model.embed_vision.embedding_projection.weight"] = torch.zeros(7, dtype=torch.bfloat16)
    tensors[f"{layer}self_attn.k_proj.weight"] = torch.zeros(2)  # dead: this layer shares keys and values
    tensors[f"{layer}extra.weight"] = torch.zeros(2)
    save_file(tensors, source / "model.safetensors")
    config = write_config(tmp_path, tmp_path / "none", layout=APART, model={"hf_path": str(source)})
    one, other = run_ranks(2, refusal, [config])
    assert one == other and "(5 tensors)" in one and str(source) in one
    for name in gone:
        assert f"{name} [" in one
    assert one.count("is missing") == 2
    assert f"{layer}mlp.gate_proj.weight has shape [3, 4], but its config.json asks for [256, 128]" in one
    assert "model.embed_vision.embedding_projection.weight has shape [7]" in one
    assert f"{layer}extra.weight [2] is unknown" in one
    assert "k_proj" not in one and "audio" not in one


def train(folder: Path, shard: Path, *arguments: str, **sections: dict) -> Path:
    """Two ranks train as configured; the run directory."""
    folder.mkdir()
    outcomes = run_ranks(2, train_on_rank, [write_config(folder, shard, **sections), *arguments])
    assert outcomes == [Outcome(None, "", ())] * 2
    return folder / "run"


def convert(capfd: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What went wrong; empty where nothing did."""
    code = main([str(argument) for argument in arguments])
    error = capfd.readouterr().err
    assert bool(code) == bool(error)
    return error


def test_a_run_without_the_towers_exports_the_whole_model(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = write_variant(tmp_path / "source", "e4b")
    shard = write_shard(tmp_path / "text.tar", {f"s{n}.json": chat("what?", "this" * (n + 1)) for n in range(6)})
    capfd.readouterr()
    run = train(
        tmp_path / "tuned", shard, "optim.lr=0.01", layout=TP2, model={"hf_path": str(source), "precision": "bf16"}
    )
    capfd.readouterr()
    assert not convert(capfd, "to-hf", run, tmp_path / "bf16", "--max-shard-size", "300KB")
    assert not convert(capfd, "to-hf", run / "checkpoints/step_00000002", tmp_path / "fp32", "--dtype", "fp32")

    before, after, exact = (stored_tensors(tmp_path / name) for name in ("source", "bf16", "fp32"))
    written = whole_tensors(run / "checkpoints/step_00000002")
    language = {name for name in before if name.startswith(LANGUAGE)}
    towers = before.keys() - language
    assert towers and after.keys() == exact.keys() == before.keys()
    assert same_bits({name: before[name] for name in towers}, {name: after[name] for name in towers})
    for name in language:
        assert torch.equal(after[name], written[f"language.weight.{name}"])
        main_weight = written.get(f"language.main_weight.{name}")  # scalars of layers are not trained
        assert torch.equal(exact[name], after[name].float() if main_weight is None else main_weight)
        assert exact[name].dtype == torch.float32
    moved = [name for name in language if not torch.equal(before[name], after[name])]
    assert len(moved) > len(language) / 2
    _, loading = AutoModelForImageTextToText.from_pretrained(tmp_path / "bf16", output_loading_info=True)
    assert not any(loading.values()), loading

    source.rename(tmp_path / "moved")
    error = convert(capfd, "to-hf", run, tmp_path / "lost")
    assert "of model.vision_tower" in error and "of model.audio_tower" in error and "--source" in error
    assert not convert(capfd, "to-hf", run, tmp_path / "found", "--source", tmp_path / "moved")
    assert same_bits(after, stored_tensors(tmp_path / "found"))


def test_a_text_only_run_exports_under_its_own_names_when_its_source_is_gone(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = write_text_only(tmp_path / "source")
    before = stored_tensors(source)
    shard = write_shard(tmp_path / "text.tar", {f"s{n}.json": chat("what?", "this" * (n + 1)) for n in range(6)})
    run = train(tmp_path / "tuned", shard, layout=TP2, model={"hf_path": str(source), "precision": "bf16"})
    shutil.rmtree(source)
    capfd.readouterr()
    assert not convert(capfd, "to-hf", run, tmp_path / "out")
    after = stored_tensors(tmp_path / "out")
    assert before.keys() - after.keys() == {"model.layers.5.self_attn.k_proj.weight"} and after.keys() < before.keys()
    _, loading = Gemma4ForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(loading.values()), loading


def test_a_preset_run_continues_alike_from_its_export_and_from_its_weights(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    members: dict[str, bytes] = {}
    for number in range(6):
        members[f"s{number}.json"] = chat("?", "one" * (number + 1), "image")
        members[f"s{number}.0.jpg"] = jpeg(96, 48, number)
    shard = write_shard(tmp_path / "train.tar", members)
    first = train(tmp_path / "first", shard, "optim.lr=0.01")
    capfd.readouterr()
    exported = tmp_path / "exported"
    assert not convert(capfd, "to-hf", first, exported)
    config = json.loads((exported / "config.json").read_text())
    assert config["audio_config"] is None and config["dtype"] == "float32"
    model, loading = AutoModelForImageTextToText.from_pretrained(exported, output_loading_info=True)
    assert not any(loading.values()), loading
    assert next(model.parameters()).dtype == torch.float32

    second = train(tmp_path / "second", shard, f"checkpoint.init_from={first}")
    third = train(tmp_path / "third", shard, model={"hf_path": str(exported)})
    assert step_records(second) == step_records(third)
    assert [record["step"] for record in step_records(second)] == [1, 2]
    assert step_records(second)[0]["loss"] != step_records(first)[0]["loss"]


def write_siglip(folder: Path) -> Path:
    """A random SigLIP with the filter of SigLIP 2."""
    widths = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4)
    vision, text = dict(**widths, num_hidden_layers=2, image_size=24, patch_size=8), dict(**widths, vocab_size=8)
    SiglipModel(SiglipConfig(vision_config=vision, text_config=text)).save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": 24, "width": 24}, resample=2, image_mean=[0.4] * 3).save_pretrained(folder)
    return folder


def test_a_run_with_another_encoder_exports_a_directory_that_trains_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """From the export alone, and from the run's weights, which hold the same model; losses are equal, bit for bit."""
    source, siglip = write_variant(tmp_path / "source", "e2b"), write_siglip(tmp_path / "siglip")
    members: dict[str, bytes] = {}
    for number in range(6):
        members |= {
            f"s{number}.json": chat("?", "one" * (number + 1), "image"),
            f"s{number}.0.jpg": jpeg(96, 48, number),
        }
    shard = write_shard(tmp_path / "train.tar", members)
    own = {"vision": {"hf_path": str(siglip)}}
    model = {"hf_path": str(source), "precision": "fp32"}
    first = train(tmp_path / "first", shard, "optim.lr=0.01", layout=TOGETHER_TP1, model=model, modules=own)
    capfd.readouterr()
    assert main(["to-hf", str(first), str(tmp_path / "out"), "--dtype", "fp32"]) == 0
    assert "transformers cannot load it: it has no Gemma 4 with siglip_vision_model" in capfd.readouterr().out
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["vision_config"]["model_type"] == "siglip_vision_model"
    assert config["vision_processor"]["image_mean"] == [0.4] * 3 and config["vision_processor"]["resample"] == 2
    names = stored_tensors(tmp_path / "out").keys()
    assert not [name for name in names if "vision_tower" in name or "embed_vision" in name]
    assert {part for name in names if not name.startswith(LANGUAGE) for part in [name.split(".")[0]]} == {
        "vision_model", "model",
    }  # fmt: skip

    from_weights = train(
        tmp_path / "second", shard, f"checkpoint.init_from={first}", layout=TOGETHER_TP1, model=model, modules=own
    )
    exported = {"hf_path": str(tmp_path / "out"), "precision": "fp32"}
    from_export = train(tmp_path / "third", shard, layout=TOGETHER_TP1, model=exported)
    assert step_records(from_export) == step_records(from_weights)
    assert step_records(from_export)[0]["loss"] != step_records(first)[0]["loss"]
    moved = source.rename(tmp_path / "moved")
    assert not convert(capfd, "to-hf", first, tmp_path / "again", "--dtype", "fp32", "--source", moved)
    assert same_bits(stored_tensors(tmp_path / "out"), stored_tensors(tmp_path / "again"))
    lone = shutil.copytree(first / "checkpoints/step_00000002", tmp_path / "lone")
    error = convert(capfd, "to-hf", lone, tmp_path / "none", "--source", moved)
    assert "the checkpoint's vision encoder is not the one of" in error


def test_an_adapter_of_a_text_only_directory_fits_its_class_and_comes_back(tmp_path: Path) -> None:
    """Its linears are the model's own, B A on top of them is the merged export, and `lora.path` reads every bit back.

    Tolerance: one product of fp32 matrices, in another order of sums.
    """
    source = write_text_only(tmp_path / "source")
    shard = write_shard(tmp_path / "text.tar", {f"s{n}.json": chat("what?", "this" * (n + 1)) for n in range(6)})
    lora = {"targets": ["*.q_proj", "*.mlp.*"], "rank": 3, "alpha": 6.0}
    model = {"hf_path": str(source), "precision": "fp32"}
    modules = {"language": {"lora": lora}}
    first = train(tmp_path / "first", shard, "optim.lr=0.05", layout=TP2, model=model, modules=modules)
    for kind in ("merge", "adapter"):
        assert main(["to-hf", str(first), str(tmp_path / kind), "--lora", kind, "--dtype", "fp32"]) == 0
    base, merged = (Gemma4ForCausalLM.from_pretrained(tmp_path / n, dtype=torch.float32) for n in ("source", "merge"))
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    scale = lora["alpha"] / lora["rank"]
    for name, a in adapter.items():
        linear, is_a, _ = name.partition(".lora_A.weight")
        if is_a:
            weight, expected = (  # PEFT wraps the model as `base_model.model`
                whole_model.get_submodule(linear.removeprefix("base_model.model.")).weight
                for whole_model in (base, merged)
            )
            change = scale * adapter[f"{linear}.lora_B.weight"] @ a
            torch.testing.assert_close(weight + change, expected, rtol=1e-5, atol=1e-6)
            assert change.abs().max() > 1e-3

    again = {"language": {"lora": lora | {"path": str(tmp_path / "adapter")}}}
    second = train(tmp_path / "second", shard, "optim.lr=0", "train.steps=1", layout=TP2, model=model, modules=again)
    assert main(["to-hf", str(second), str(tmp_path / "back"), "--lora", "adapter"]) == 0
    assert same_bits(adapter, load_file(tmp_path / "back" / "adapter_model.safetensors"))

"""Fine-tuning with adapters from a Hugging Face directory: resumed bit for bit, exported for PEFT and merged."""

import json
import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import Gemma4ForConditionalGeneration

from mimo_gemma4.checkpoint.save_load import read_marker
from mimo_gemma4.convert.__main__ import main
from mimo_gemma4.errors import ConfigError
from mimo_gemma4.weights.lora_files import CONFIG, TENSORS, TrainedAdapters, adapted_linears
from tests.checkpoint_reader import whole_tensors
from tests.dist.harness import run_ranks
from tests.e2e.training_runs import Outcome, step_records, train_on_rank, write_config
from tests.huggingface_models import stored_tensors
from tests.vlm_reference import huggingface_step, write_model, write_shards

LAYOUT = {"vision": {"ranks": 1}, "language": {"ranks": 2, "tp": 2, "sequence_parallel": True}}
MODULES = {
    "vision": {"lora": {"targets": ["*.self_attn.[qv]_proj.linear"], "rank": 2, "alpha": 3.0}},
    "language": {"lora": {"targets": ["*.q_proj", "*.v_proj", "*.mlp.*"], "rank": 4, "rank_stabilized": True}},
}
SCALES = {"vision": 1.5, "language": 16.0}
BATCH, SEED = 6, 3
STEP_2, STEP_4 = "checkpoints/step_00000002", "checkpoints/step_00000004"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`straight`: four steps at once. `resumed`: two, then two more in new processes."""
    folder = tmp_path_factory.mktemp("lora")
    write_model(folder / "model")
    write_shards(folder)
    run(folder, f"run.dir={folder}/straight", "train.steps=4", "checkpoint.every=2")
    run(folder, f"run.dir={folder}/resumed", "train.steps=2")
    run(folder, f"run.dir={folder}/resumed", "train.steps=4")
    return folder


def run(folder: Path, *arguments: str) -> None:
    outcomes = outcomes_of(folder, *arguments)
    assert all(outcome.error is None for outcome in outcomes), outcomes


def outcomes_of(folder: Path, *arguments: str) -> list[Outcome]:
    config = write_config(
        folder,
        folder / "train-000000.tar",
        model={"hf_path": str(folder / "model"), "preset": "gemma4_tiny"},
        layout=LAYOUT,
        modules=MODULES,
        train={"global_batch_size": BATCH},
        run={"seed": SEED},
        optim={"lr": 5e-3},
    )
    return run_ranks(3, train_on_rank, [config, *arguments])


def test_resumed_run_equals_the_straight_one_bit_for_bit(folder: Path) -> None:
    straight = step_records(folder / "straight")
    assert len({record["loss"] for record in straight}) == 4
    assert step_records(folder / "resumed") == straight
    for path in sorted((folder / "straight" / STEP_4).glob("*.safetensors")):
        one, other = load_file(path), load_file(folder / "resumed" / STEP_4 / path.name)
        assert one.keys() == other.keys()
        assert all(
            torch.equal(one[key].view(-1).view(torch.uint8), other[key].view(-1).view(torch.uint8)) for key in one
        )


def test_only_adapters_have_optimizer_state_and_change(folder: Path) -> None:
    tensors = whole_tensors(folder / "straight" / STEP_4)
    moments = {key.partition(".exp_avg.")[2] for key in tensors if ".exp_avg." in key}
    base = {key.partition(".weight.")[2]: tensor for key, tensor in tensors.items() if ".weight." in key}
    assert moments and all(".lora_" in name for name in moments)
    assert moments == {name for name in base if ".lora_" in name}
    started = load_file(folder / "model" / "model.safetensors")
    for name in base.keys() - moments:
        assert torch.equal(base[name], started[name]), name


def trained_adapters(folder: Path) -> TrainedAdapters:
    path = folder / "straight" / STEP_2
    marker = read_marker(path)
    assert isinstance(marker, dict) and marker["trainer"]["lora"] == SCALES
    tensors, scales = {}, {}
    for key, tensor in whole_tensors(path).items():
        module, _, name = key.partition(".weight.")
        if ".lora_" in name:
            tensors[name] = tensor
            scales |= dict.fromkeys(adapted_linears([name]), SCALES[module])
    return TrainedAdapters(tensors, scales)


def exported_losses(rank: int, folder: Path) -> tuple[float, float, float]:
    """Loss of the third step with the adapter, with merged weights, and without either."""
    base = Gemma4ForConditionalGeneration.from_pretrained(folder / "model", dtype=torch.float32)
    adapters = trained_adapters(folder)
    adapters.save(folder / "adapter", base_model=str(folder / "model"))
    merged = Gemma4ForConditionalGeneration.from_pretrained(folder / "model", dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in merged.named_parameters():
            parameter.copy_(adapters.merged(name, parameter))
    ids = torch.arange(20, 60)[None]
    with torch.no_grad():
        plain = base(input_ids=ids).logits
        adapted = PeftModel.from_pretrained(base, folder / "adapter")(input_ids=ids).logits
        # fp32: W x + s B (A x) against (W + s B A) x, a few roundings apart
        torch.testing.assert_close(merged(input_ids=ids).logits, adapted, rtol=1e-4, atol=1e-4)
        assert (adapted - plain).abs().max() > 1e-2
    merged.save_pretrained(folder / "merged")
    config = (folder / "model" / "config.json").read_text()
    (folder / "merged" / "config.json").write_text(config)
    shard = folder / "train-000000.tar"
    with_adapter = huggingface_step(folder / "model", shard, 2, BATCH, SEED, adapter=folder / "adapter")
    return (
        with_adapter.loss,
        huggingface_step(folder / "merged", shard, 2, BATCH, SEED).loss,
        huggingface_step(folder / "model", shard, 2, BATCH, SEED).loss,
    )


def test_exports_are_the_trained_model(folder: Path) -> None:
    adapter, merged, untrained = run_ranks(1, exported_losses, folder)[0]
    expected = step_records(folder / "straight")[2]["loss"]  # of the weights that the checkpoint of step 2 holds
    assert adapter == pytest.approx(expected, rel=1e-5)
    assert merged == pytest.approx(expected, rel=1e-5)
    assert abs(untrained - expected) > 1e-2 * expected
    checkpoint, exported = folder / "straight/checkpoints/step_00000002", folder / "exported"
    assert main(["to-hf", str(checkpoint), str(exported), "--dtype", "fp32"]) == 0
    by_command, by_model = stored_tensors(exported), stored_tensors(folder / "merged")
    assert by_command.keys() == by_model.keys()
    for name, tensor in by_command.items():  # one product of fp32 matrices, in another order of sums
        torch.testing.assert_close(tensor, by_model[name], rtol=1e-5, atol=1e-6)
    assert main(["to-hf", str(checkpoint), str(folder / "peft"), "--lora", "adapter"]) == 0
    by_command, by_library = (load_file(folder / name / TENSORS) for name in ("peft", "adapter"))
    assert by_command.keys() == by_library.keys()
    assert all(torch.equal(tensor, by_library[name]) for name, tensor in by_command.items())
    assert json.loads((folder / "peft" / CONFIG).read_text()) == json.loads((folder / "adapter" / CONFIG).read_text())


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("modules.language.lora.alpha=8", "language in .* have the scale 16.0, but modules.language.lora asks for 4.0"),
        ("modules.vision.lora=null", "vision in .* have the scale 1.5, but modules.vision.lora asks for None"),
    ],
)
def test_adapters_are_not_lost_on_resuming(argument: str, message: str, folder: Path) -> None:
    for outcome in outcomes_of(folder, f"run.dir={folder}/resumed", "train.steps=5", argument):
        assert outcome.error is ConfigError and re.search(message, outcome.message), outcome

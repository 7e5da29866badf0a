"""A run that is stopped and resumed equals an uninterrupted one bit for bit, and on another layout within rounding."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mimo_gemma4.errors import ConfigError
from tests.dist.harness import run_ranks
from tests.e2e.training_runs import step_records, train_on_rank, write_config
from tests.vlm_reference import write_shards

TENSOR_PARALLEL = {"vision": {"ranks": 2}, "language": {"ranks": 2, "tp": 2, "sequence_parallel": True}}
DATA_PARALLEL = {"vision": {"ranks": 1}, "language": {"ranks": 2}}
OPTIM = {"lr": 1e-3, "weight_decay": 0.1, "clip_grad": 0.5}
STEP_2, STEP_4 = "checkpoints/step_00000002", "checkpoints/step_00000004"


def run(ranks: int, *arguments: str) -> None:
    outcomes = run_ranks(ranks, train_on_rank, list(arguments))
    assert all(outcome.error is None for outcome in outcomes), outcomes


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`straight`: four steps at once. `resumed`: two, then two more in new processes."""
    folder = tmp_path_factory.mktemp("resume")
    config = write_config(folder, write_shards(folder), layout=TENSOR_PARALLEL, optim=OPTIM)
    run(4, config, f"run.dir={folder}/straight", "train.steps=4", "checkpoint.every=2")
    run(4, config, f"run.dir={folder}/resumed", "train.steps=2")
    run(4, config, f"run.dir={folder}/resumed", "train.steps=4")
    return folder


def test_losses_and_gradient_norms_are_the_same_bits(runs: Path) -> None:
    straight = step_records(runs / "straight")
    assert [record["step"] for record in straight] == [1, 2, 3, 4]
    assert len({record["loss"] for record in straight}) == 4
    assert step_records(runs / "resumed") == straight


@pytest.mark.parametrize("step", [STEP_2, STEP_4])
def test_weights_and_optimizer_state_are_the_same_bits(runs: Path, step: str) -> None:
    files = sorted(path.name for path in (runs / "straight" / step).glob("*.safetensors"))
    assert len(files) == 4
    for name in files:
        one, other = (load_file(runs / folder / step / name) for folder in ("straight", "resumed"))
        assert one.keys() == other.keys()
        for key, tensor in one.items():
            assert torch.equal(tensor.reshape(-1).view(torch.uint8), other[key].reshape(-1).view(torch.uint8)), key


def test_weights_changed_in_every_module_after_the_checkpoint(runs: Path) -> None:
    for name in ("rank_00000.safetensors", "rank_00002.safetensors"):
        before, after = (load_file(runs / "resumed" / step / name) for step in (STEP_2, STEP_4))
        assert any(not torch.equal(tensor, after[key]) for key, tensor in before.items() if ".weight." in key)


def test_another_layout_continues_the_run(runs: Path) -> None:
    """Sums in another order differ by a few fp32 roundings: the project's 1e-5."""
    folder = runs / "other layout"
    folder.mkdir()
    config = write_config(folder, runs / "train-000000.tar", layout=DATA_PARALLEL, optim=OPTIM)
    run(3, config, "train.steps=4", f"checkpoint.resume={runs / 'resumed' / STEP_2}")
    continued, straight = step_records(folder / "run"), step_records(runs / "straight")[2:]
    assert [record["step"] for record in continued] == [3, 4]
    for record, expected in zip(continued, straight, strict=True):
        assert record["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert record["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
        assert record["loss_tokens"] == expected["loss_tokens"]


def test_a_run_goes_on_with_another_batch_size_but_not_with_another_seed(runs: Path) -> None:
    """Two steps of 6 samples, then one of 4."""
    folder, start = runs / "other batch", f"checkpoint.resume={runs / 'resumed' / STEP_2}"
    folder.mkdir()
    config = write_config(folder, runs / "train-000000.tar", layout=DATA_PARALLEL, optim=OPTIM)
    run(3, config, "train.steps=3", "train.global_batch_size=4", start)
    trainer = json.loads((folder / "run/checkpoints/step_00000003/complete.json").read_text())["trainer"]
    assert trainer["data"]["batch_size"] == 4 and trainer["data"]["sources"][0]["consumed"] == 2 * 6 + 4
    outcomes = run_ranks(3, train_on_rank, [config, "train.steps=4", "run.seed=4", start])
    assert all(outcome.error is ConfigError and "run.seed is 4, was 3" in outcome.message for outcome in outcomes)

"""A run with a decoder records its loss, evaluates, resumes on any layout, and exports Gemma 4 without it."""

import json
import math
from pathlib import Path

import pytest
from safetensors import safe_open

from mimo_gemma4.convert.__main__ import main
from tests.dist.harness import run_ranks
from tests.e2e.training_runs import step_records, train_on_rank, write_config
from tests.vlm_reference import write_shards

WITHOUT = {"vision": {"ranks": 1}, "language": {"ranks": 1}}
APART = WITHOUT | {"pixels": {"ranks": 1, "reads": "vision"}}
TOGETHER = {"vision": {}, "language": {}, "pixels": {"tp": 2, "reads": "vision"}, "placement": "colocated"}
PIXELS = {"pixels": {"decoder": "pixel_regression", "loss_weight": 0.5, "schedule": "linear"}}
STEP_2 = "checkpoints/step_00000002"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base` has no decoder; `straight` starts from its weights; `resumed` and `together` continue after two steps."""
    folder = tmp_path_factory.mktemp("decoder")
    shard = write_shards(folder)

    def run(name: str, ranks: int, layout: dict, modules: dict, *arguments: str) -> None:
        path = folder / name
        path.mkdir()
        sections = {"modules": modules, "optim": {"lr": 1e-3}, "eval": {"batch_size": 4}}
        config = write_config(path, shard, layout=layout, **sections)
        valid = f"data.valid.shards={shard}"
        outcomes = run_ranks(ranks, train_on_rank, [config, valid, *arguments])
        assert all(outcome.error is None for outcome in outcomes), outcomes

    run("base", 2, WITHOUT, {}, "train.steps=1")
    start = f"checkpoint.init_from={folder / 'base' / 'run'}"
    run("straight", 3, APART, PIXELS, "train.steps=4", "checkpoint.every=2", start)
    resume = f"checkpoint.resume={folder / 'straight' / 'run' / STEP_2}"
    run("resumed", 3, APART, PIXELS, "train.steps=4", resume)
    run("together", 2, TOGETHER, PIXELS, "train.steps=4", resume)
    return folder


def test_a_resumed_run_is_bit_for_bit_the_same(runs: Path) -> None:
    straight = step_records(runs / "straight" / "run")
    assert [record["step"] for record in straight] == [1, 2, 3, 4]
    assert len({record["losses"]["pixels"] for record in straight}) == 4
    assert step_records(runs / "resumed" / "run") == straight[2:]


def test_every_module_records_its_learning_rate_and_gradient_norm(runs: Path) -> None:
    lines = (runs / "straight" / "run" / "metrics.jsonl").read_text().splitlines()
    modules = [record["modules"] for record in map(json.loads, lines)]
    assert [step["pixels"]["lr"] for step in modules] == pytest.approx([7.5e-4, 5e-4, 2.5e-4, 0.0])
    assert {step[name]["lr"] for step in modules for name in WITHOUT} == {1e-3}
    norms = [[step[name]["grad_norm"] for name in APART] for step in modules]
    assert all(norm > 0 for step in norms for norm in step)
    whole = [record["grad_norm"] for record in step_records(runs / "straight" / "run")]
    assert [math.hypot(*step) for step in norms] == pytest.approx(whole)


def test_on_shared_ranks_the_run_continues_with_the_same_losses(runs: Path) -> None:
    """Sums in another order differ by a few fp32 roundings: the project's 1e-5."""
    straight, together = (step_records(runs / name / "run") for name in ("straight", "together"))
    for record, expected in zip(together, straight[2:], strict=True):
        assert record["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert record["losses"]["pixels"] == pytest.approx(expected["losses"]["pixels"], rel=1e-5)
        assert record["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
    ends = [json.loads((runs / name / "run" / "eval.json").read_text()) for name in ("straight", "together")]
    assert ends[1]["losses"]["pixels"] == pytest.approx(ends[0]["losses"]["pixels"], rel=1e-4)


def test_without_a_decoder_there_are_no_further_losses(runs: Path) -> None:
    assert [record["losses"] for record in step_records(runs / "base" / "run")] == [{}]


def test_an_export_leaves_the_decoder_out_and_says_so(runs: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("base", "straight"):
        assert main(["to-hf", str(runs / name / "run"), str(runs / name / "exported")]) == 0
    assert [line for line in caplog.messages if "left out" in line] == [
        "decoders are no part of Gemma 4 and are left out: pixels"
    ]
    names = []
    for name in ("base", "straight"):
        with safe_open(runs / name / "exported" / "model.safetensors", framework="pt") as file:
            names.append(set(file.keys()))
    assert names[0] == names[1] and not any(name.startswith("decoders.") for name in names[1])

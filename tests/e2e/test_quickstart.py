"""The quickstart learns to read digits: held-out images that it never saw, answered by its own greedy decoding.

An answer is one or two digits, so guessing is right about 4 times in 100.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mimo_gemma4.config import load_config
from mimo_gemma4.data.quickstart import ensure_shards
from mimo_gemma4.train.build import build_trainer
from mimo_gemma4.train.setup import set_up_run
from tests.dist.harness import run_ranks
from tests.e2e.training_runs import Outcome, train_on_rank

RANKS = 4
SHORT = [
    "layout.language.tp=1",
    "layout.language.sequence_parallel=false",
    "train.steps=180",
    "train.microbatch_size=16",
    "logging.tensorboard=false",
]
"""Two language lanes, and a quarter of the steps: under a minute on two cores."""


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments that put the quickstart's shards into a temporary folder."""
    folder = tmp_path_factory.mktemp("digits")
    ensure_shards("digits", folder)
    return [
        f"data.train.shards={folder}/train-{{000000..000003}}.tar",
        f"data.valid.shards={folder}/valid-000000.tar",
    ]


def run_quickstart(folder: Path, *arguments: str, timeout: float) -> dict[str, Any]:
    """Train and return the content of `eval.json`."""
    command = ["config=quickstart.yaml", f"run.dir={folder}", *arguments]
    outcomes = run_ranks(RANKS, train_on_rank, command, timeout=timeout)
    assert outcomes == [Outcome(None, "", ())] * RANKS
    return json.loads((folder / "eval.json").read_text())


def test_a_short_quickstart_reads_held_out_digits(tmp_path: Path, digits: list[str]) -> None:
    result = run_quickstart(tmp_path, *digits, *SHORT, timeout=200)
    print(f"exact match {result['accuracy']:.1%} of {result['items']}, loss {result['loss']:.3f}")
    assert result["items"] >= 200
    assert result["accuracy"] > 0.5
    assert result.keys() == {"step", "loss", "losses", "accuracy", "items", "per_modality"}
    assert result["losses"] == {}  # of decoders, which this run has none of
    assert result["per_modality"] == {"vision": {"accuracy": result["accuracy"], "items": result["items"]}}
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, result["step"] + 1))
    assert records[-1]["loss"] < records[0]["loss"] / 3
    assert all(set(record["modules"]) == {"vision", "language"} for record in records)
    for picture in ("loss.png", "samples.png"):
        assert min(Image.open(tmp_path / picture).size) > 100
    checkpoint = tmp_path / "checkpoints" / f"step_{result['step']:08d}"
    assert len(list(checkpoint.glob("rank_*.safetensors"))) == RANKS and (checkpoint / "complete.json").is_file()


def accuracy_without_images(rank: int, arguments: list[str]) -> tuple[float, float] | None:
    """Exact match of the trained model, and with a projector of zeros, so that the soft tokens of images are zero."""
    config = load_config(arguments)
    trainer = build_trainer(set_up_run(config))
    seeing = trainer.evaluate()
    with torch.no_grad():
        for encoder in trainer.model.encoders.values():
            for parameter in encoder.projector_parameters():
                parameter.zero_()
    blind = trainer.evaluate()
    trainer.loader.close()
    return None if seeing is None or blind is None else (seeing["accuracy"], blind["accuracy"])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_quickstart_reads_nearly_all_held_out_digits_and_none_without_seeing(
    tmp_path: Path, digits: list[str]
) -> None:
    result = run_quickstart(tmp_path, *digits, timeout=1500)
    print(f"exact match {result['accuracy']:.1%} of {result['items']}, loss {result['loss']:.3f}")
    assert result["items"] >= 200
    assert result["accuracy"] >= 0.95
    arguments = ["config=quickstart.yaml", f"run.dir={tmp_path}", *digits]
    seeing, blind = run_ranks(RANKS, accuracy_without_images, arguments)[0]
    print(f"the checkpoint reads {seeing:.1%}, and {blind:.1%} with a projector of zeros")
    assert seeing == result["accuracy"]
    assert blind < 0.15

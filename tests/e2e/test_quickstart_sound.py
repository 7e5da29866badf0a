"""The quickstart with sound learns digits by eye, by ear, by both at once and from text, on three grids."""

import json
import math
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from mimo_gemma4.config import load_config
from mimo_gemma4.data import digits_and_tones
from mimo_gemma4.data.quickstart import ensure_shards
from mimo_gemma4.train.build import build_trainer
from mimo_gemma4.train.report import write_report
from mimo_gemma4.train.setup import set_up_run
from tests.dist.harness import run_ranks
from tests.e2e.training_runs import Outcome, train_on_rank

RANKS = 4
STEPS = 8
KINDS = {"text", "vision", "audio", "audio+vision"}


def shard_arguments(folder: Path) -> list[str]:
    """Arguments that put the quickstart's shards into `folder`, which holds them afterwards."""
    ensure_shards("digits_and_tones", folder)
    return [
        f"data.train.shards={folder}/train-{{000000..000003}}.tar",
        f"data.valid.shards={folder}/valid-000000.tar",
    ]


def train_and_count_kinds(rank: int, arguments: list[str]) -> Counter[str]:
    """Train; the modules that feed a microbatch, `audio+vision` for example, by how many microbatches they feed."""
    config = load_config(arguments)
    trainer = build_trainer(set_up_run(config))
    trainer.fit()
    if rank == 0:
        write_report(trainer)
    kinds: Counter[str] = Counter()
    for step in range(config.train.steps):
        manifest = trainer.loader.planner.plan(step)
        for batch in manifest.microbatches:
            fed = {m.module for m in manifest.media if (m.lane, m.microbatch) == (batch.lane, batch.number)}
            kinds["+".join(sorted(fed)) or "text"] += 1
    return kinds


def test_a_few_steps_see_every_kind_of_microbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digits_and_tones, "TRAIN_SAMPLES", 100)
    monkeypatch.setattr(digits_and_tones, "VALID_SAMPLES", 6)
    arguments = ["config=quickstart_sound.yaml", f"run.dir={tmp_path}", *shard_arguments(tmp_path / "data")]
    arguments += [f"train.steps={STEPS}", "optim.warmup_steps=2", "logging.tensorboard=false"]
    kinds = run_ranks(RANKS, train_and_count_kinds, arguments, timeout=200)
    assert all(counted == kinds[0] for counted in kinds)
    assert kinds[0].keys() == KINDS and kinds[0].total() == 4 * STEPS
    losses = [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == STEPS and all(map(math.isfinite, losses))
    assert losses[-1] < 0.7 * losses[0]
    result = json.loads((tmp_path / "eval.json").read_text())
    assert {kind: part["items"] for kind, part in result["per_modality"].items()} == dict.fromkeys(KINDS, 6)
    assert min(Image.open(tmp_path / "samples.png").size) > 100


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_it_answers_nine_of_ten_held_out_items_of_every_kind(tmp_path: Path) -> None:
    arguments = ["config=quickstart_sound.yaml", f"run.dir={tmp_path}", *shard_arguments(tmp_path / "data")]
    assert run_ranks(RANKS, train_on_rank, arguments, timeout=2300) == [Outcome(None, "", ())] * RANKS
    found = json.loads((tmp_path / "eval.json").read_text())["per_modality"]
    print({kind: f"{part['accuracy']:.1%} of {part['items']}" for kind, part in found.items()})
    assert found.keys() == KINDS
    assert all(part["accuracy"] >= 0.9 and part["items"] == 100 for part in found.values())

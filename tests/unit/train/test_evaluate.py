"""An evaluation's loss is the mean over all tokens of all batches; accuracy is exact match, in all and per modality.

Losses of the fakes are small binary fractions, so they are compared exactly. The tiny model's loss is compared with
torch's cross entropy of its own logits, sample by sample: fp32 sums in another order, 1e-5.
"""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from mimo_gemma4.config import EvalConfig, LayoutConfig, ModuleLayout, load_config
from mimo_gemma4.distributed.layout import build_layout
from mimo_gemma4.distributed.platform import CPU, Platform
from mimo_gemma4.train import evaluate
from mimo_gemma4.train.build import build_trainer
from mimo_gemma4.train.evaluate import AnsweredSample, Evaluator
from mimo_gemma4.train.greedy_answers import Answer
from mimo_gemma4.train.setup import set_up_run
from mimo_gemma4.train.step import StepTotals
from tests.dist.harness import run_ranks
from tests.e2e.training_runs import write_config
from tests.shard_maker import chat, jpeg, write_shard

WORDS = {1: "one", 2: "two", 3: "three", 9: "nine"}
"""Answers of the fakes, by token id."""


@pytest.fixture
def one_rank() -> Iterator[None]:
    """A world of one in this process, for reductions and gathers."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Batch(SimpleNamespace):
    """One fake evaluation batch: its loss and token count, samples, answers, and the decoder's loss and soft tokens."""

    loss_sum: float
    loss_tokens: int
    samples: list[int]
    answers: list[Answer]
    decoder_loss: float
    soft_tokens: int

    @property
    def manifest(self) -> SimpleNamespace:
        return SimpleNamespace(samples=self.samples, soft_tokens_of=lambda name: self.soft_tokens)


def make_batch(loss_sum: float, loss_tokens: int, samples: list[int], **other: Any) -> Batch:
    values = {"answers": [], "decoder_loss": 0.0, "soft_tokens": 0} | other
    return Batch(loss_sum=loss_sum, loss_tokens=loss_tokens, samples=samples, **values)


def make_evaluator(
    monkeypatch: pytest.MonkeyPatch, batches: list[Batch], modalities: dict[int, list[str]], max_new_tokens: int = 4
) -> Evaluator:
    """An evaluator whose model, data and answers are fakes: only its own sums, means and counts are real."""
    modules = {"vision": ModuleLayout(), "language": ModuleLayout(), "pixels": ModuleLayout(reads="vision")}
    group = dist.group.WORLD
    config = SimpleNamespace(
        eval=EvalConfig(max_new_tokens=max_new_tokens), module=lambda name: SimpleNamespace(run_ahead=1)
    )
    model = SimpleNamespace(
        config=config,
        layout=build_layout(LayoutConfig(modules, placement="colocated"), 1),
        platform=Platform(CPU, "gloo"),
        rank=0,
        modules={"language": nn.Linear(1, 1)},
        groups=SimpleNamespace(host=group, modules={"language": SimpleNamespace(tp=group, cp=group, pp=group)}),
    )
    encoder = SimpleNamespace(stop_ids=frozenset({0}), decode=lambda ids: " ".join(WORDS[number] for number in ids))
    media = {number: [SimpleNamespace(modality=name) for name in names] for number, names in modalities.items()}
    loader = SimpleNamespace(
        planner=SimpleNamespace(steps=len(batches)),
        load=batches.__getitem__,
        dataset=SimpleNamespace(encoder=encoder, media=media.__getitem__),
    )
    evaluator = Evaluator(config, model, loader)

    def run(batch: Batch, train: bool, observe: Any) -> StepTotals:
        assert not train and not model.modules["language"].training
        if observe is not None:
            observe(batch, None, [])
        fp64 = torch.float64
        return StepTotals(
            torch.tensor(batch.loss_sum, dtype=fp64),
            torch.tensor(batch.loss_tokens, dtype=fp64),
            decoder_losses={"pixels": torch.tensor(batch.decoder_loss, dtype=fp64)},
        )

    evaluator.runner = SimpleNamespace(run=run)
    monkeypatch.setattr(evaluate, "greedy_answers", lambda model, batch, *rest, **options: batch.answers)
    return evaluator


@pytest.mark.usefixtures("one_rank")
def test_the_loss_is_the_mean_over_the_tokens_of_all_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = [make_batch(8.0, 4, [0, 1]), make_batch(0.5, 1, [2, 3]), make_batch(0.0, 0, [4]), make_batch(7.0, 3, [5])]
    result = make_evaluator(monkeypatch, batches, {}, max_new_tokens=0).run(17)
    assert result == {
        "step": 17,
        "loss": 15.5 / 8,  # not the mean of the batches' means 2, 0.5, 0 and 7 / 3
        "losses": {"pixels": None},
        "accuracy": None,
        "items": 6,
        "per_modality": {},
    }


@pytest.mark.usefixtures("one_rank")
def test_a_decoder_s_loss_is_the_mean_over_its_soft_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = [
        make_batch(1.0, 1, [0], decoder_loss=6.0, soft_tokens=2),
        make_batch(1.0, 1, [1]),
        make_batch(1.0, 1, [2], decoder_loss=1.0, soft_tokens=6),
    ]
    result = make_evaluator(monkeypatch, batches, {}, max_new_tokens=0).run(0)
    assert result is not None and result["losses"] == {"pixels": 7.0 / 8}


@pytest.mark.usefixtures("one_rank")
def test_without_samples_there_is_no_division_by_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    result = make_evaluator(monkeypatch, [], {}).run(0)
    assert result is not None
    assert (result["loss"], result["accuracy"], result["items"], result["per_modality"]) == (0.0, 0.0, 0, {})


@pytest.mark.usefixtures("one_rank")
def test_accuracy_is_exact_match_in_all_and_per_combination_of_modalities(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = [  # in another order than the dataset's; sample 3 has no answer, as a masked one
        make_batch(1.0, 1, [5, 3, 1], answers=[Answer(5, [1], [1]), Answer(1, [2, 3], [2, 3])]),
        make_batch(1.0, 1, [0, 2], answers=[Answer(0, [1], [1, 9]), Answer(2, [], [9])]),
        make_batch(1.0, 1, [4], answers=[Answer(4, [3], [3])]),
    ]
    modalities = {
        0: ["vision"],
        1: ["vision", "vision"],
        2: ["vision", "audio"],
        3: ["vision"],
        4: [],
        5: ["audio", "vision", "audio"],
    }
    evaluator = make_evaluator(monkeypatch, batches, modalities)
    result = evaluator.run(0)
    assert result is not None
    assert (result["accuracy"], result["items"]) == (3 / 5, 5)
    assert result["per_modality"] == {
        "vision": {"accuracy": 0.5, "items": 2},
        "audio+vision": {"accuracy": 0.5, "items": 2},
        "text": {"accuracy": 1.0, "items": 1},
    }
    assert evaluator.answered == [
        AnsweredSample(0, "one", "one nine"),
        AnsweredSample(1, "two three", "two three"),
        AnsweredSample(2, "", "nine"),
        AnsweredSample(4, "three", "three"),
        AnsweredSample(5, "one", "one"),
    ]
    assert evaluator.model.modules["language"].training, "training goes on after an evaluation"


# --- a tiny model ---

ANSWERS = ["a", "four", "no", "seventeen", "six"]
MASKED = 3


def write_data(folder: Path) -> Path:
    members: dict[str, bytes] = {}
    for number, answer in enumerate(ANSWERS):
        media = ["image"] if number % 2 else []
        members[f"s{number}.json"] = chat("?" * (1 + number), answer, *media)
        if media:
            members[f"s{number}.0.jpg"] = jpeg(48, 48, number)
    return write_shard(folder / "data.tar", members)


def evaluate_tiny_model(rank: int, config: str, shard: Path) -> tuple[dict[str, Any], list[int], list[tuple]]:
    """The result with sample `MASKED` masked, the samples answered, and per sample (loss sum, tokens) by torch."""
    options = [f"data.valid.shards={shard}", "eval.batch_size=2", "eval.max_new_tokens=2"]
    trainer = build_trainer(set_up_run(load_config([config, *options])))
    evaluator, model = trainer.evaluator, trainer.model
    assert evaluator is not None and model.language is not None
    expected = []

    def load_masked(step: int) -> Any:
        data = load(step)
        for number, batch in data.language.items():
            for planned in data.manifest.microbatch(0, number).samples:
                if planned.index == MASKED:
                    batch.labels[planned.sequence] = -100
        return data

    def observe(batch: Any, microbatch: Any, media: Any) -> None:
        hidden = model.hidden(model.local_tokens(batch, microbatch), media)
        logits = model.language.logits(hidden)  # [B, S, vocabulary]
        for planned in microbatch.samples:
            labels = batch.labels[planned.sequence]
            loss = F.cross_entropy(logits[planned.sequence], labels, reduction="sum", ignore_index=-100)
            expected.append((planned.index, float(loss), int((labels != -100).sum())))

    load, evaluator.loader.load = evaluator.loader.load, load_masked
    for step in range(evaluator.loader.planner.steps):
        evaluator.runner.run(evaluator.loader.load(step), train=False, observe=observe)
    result = evaluator.run(0)
    trainer.close()
    return result, [sample.index for sample in evaluator.answered], expected


def test_a_tiny_model_s_loss_is_the_cross_entropy_of_its_logits_and_a_masked_sample_counts_nowhere(
    tmp_path: Path,
) -> None:
    shard = write_data(tmp_path)
    layout = {"vision": {}, "language": {}, "placement": "colocated"}
    config = write_config(tmp_path, shard, layout=layout)
    [(result, answered, samples)] = run_ranks(1, evaluate_tiny_model, config, shard)
    tokens = {index: count for index, _, count in samples}
    assert tokens == {i: 0 if i == MASKED else len(answer) + 1 for i, answer in enumerate(ANSWERS)}  # and end of turn
    assert result["loss"] == pytest.approx(sum(loss for _, loss, _ in samples) / sum(tokens.values()), rel=1e-5)
    assert answered == [0, 1, 2, 4] and result["items"] == 4
    assert {kind: part["items"] for kind, part in result["per_modality"].items()} == {"text": 3, "vision": 1}

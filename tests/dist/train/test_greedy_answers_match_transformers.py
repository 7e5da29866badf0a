"""Greedy answers are, id for id, what transformers' `generate` answers to the same prompts, whatever the layout.

In fp32 the two differ by roundings of 1e-6 in a logit, far less than the gap between the best and the second best id.
"""

import json
from pathlib import Path

import pytest
import torch
from transformers import Gemma4ForConditionalGeneration

from mimo_gemma4.config import load_config
from mimo_gemma4.data.chat import ConversationEncoder
from mimo_gemma4.data.dataset import ShardDataset
from mimo_gemma4.data.tokenizer import byte_tokenizer, media_tokens
from mimo_gemma4.encoders.registry import build_processor
from mimo_gemma4.train.build import build_trainer
from mimo_gemma4.train.greedy_answers import Answer, greedy_answers
from mimo_gemma4.train.setup import set_up_run
from mimo_gemma4.train.step import StepRunner
from tests.dist.harness import run_ranks
from tests.vlm_reference import SAMPLES, transformers_media, write_model, write_shards

MAX_NEW_TOKENS = 6
LAYOUTS = {
    "one rank": (1, ["layout.placement=colocated"]),
    "vision 2, tp 2 with sp": (
        4,
        ["layout.vision.ranks=2", "layout.language={ranks: 2, tp: 2, sequence_parallel: true}"],
    ),
    "cp 2": (3, ["layout.vision.ranks=1", "layout.language={ranks: 2, cp: 2}"]),
    "pp 2, cp 2": (5, ["layout.vision.ranks=1", "layout.language={ranks: 4, cp: 2, pp: 2}"]),
    "stages of both, colocated": (2, ["layout.placement=colocated", "layout.vision.pp=2", "layout.language.pp=2"]),
}


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generate")
    write_model(folder / "model")
    shard = write_shards(folder)
    (folder / "run.yaml").write_text(
        f"""
        run: {{dir: {folder}/run}}
        model: {{hf_path: {folder}/model, precision: fp32}}
        layout: {{vision: {{}}, language: {{}}}}
        data: {{train: {{shards: "{shard}"}}, valid: {{shards: "{shard}"}}, seq_length: 300}}
        train: {{microbatch_size: 3}}
        eval: {{batch_size: {SAMPLES - 3}}}
        logging: {{tensorboard: false}}
        """
    )
    return folder


def transformers_answers(rank: int, folder: Path) -> list[list[int]]:
    """Generated ids of every sample, by its number in the shard: the prompt alone, no padding, no parallelism."""
    hf_config = json.loads((folder / "model/config.json").read_text())
    processor = build_processor("vision", hf_config)
    encoder = ConversationEncoder(byte_tokenizer(), [processor], media_tokens(hf_config))
    dataset = ShardDataset.open(str(folder / "train-000000.tar"), encoder, seq_length=300)
    model = Gemma4ForConditionalGeneration.from_pretrained(
        folder / "model", attn_implementation="eager", dtype=torch.float32
    )
    answers = []
    for index in range(len(dataset)):
        encoded = dataset.encode(index)
        prompt = int((encoded.labels != -100).argmax()) + 1
        prompt_ids = torch.from_numpy(encoded.input_ids[:prompt])[None]
        ids = model.generate(
            input_ids=prompt_ids,
            attention_mask=torch.ones(1, prompt, dtype=torch.long),
            **transformers_media(dataset, index, prompt_ids),
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
            eos_token_id=sorted(encoder.stop_ids),
        )
        answers.append(ids[0, prompt:].tolist())
    return answers


def own_answers(rank: int, folder: Path, overrides: list[str]) -> list[tuple[Answer, int]]:
    """This rank's answers, each with the number of positions that its sequence leaves for one."""
    config = load_config([f"config={folder}/run.yaml", *overrides])
    trainer = build_trainer(set_up_run(config))
    loader, runner, answers = trainer.evaluator.loader, StepRunner(trainer.model), []

    def observe(batch, microbatch, media) -> None:  # noqa: ANN001
        found = greedy_answers(
            trainer.model, batch, microbatch, media,
            max_new_tokens=MAX_NEW_TOKENS, stop_ids=loader.dataset.encoder.stop_ids,
        )  # fmt: skip
        for planned, answer in zip(microbatch.samples, found, strict=True):
            prompt = int((batch.labels[planned.sequence] != -100).int().argmax()) + 1
            answers.append((answer, microbatch.seq_length - prompt))

    for step in range(loader.planner.steps):
        runner.run(loader.load(step), train=False, observe=observe)
    loader.close()
    trainer.loader.close()
    return answers


@pytest.fixture(scope="module")
def expected(run_folder: Path) -> list[list[int]]:
    return run_ranks(1, transformers_answers, run_folder)[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ids_are_those_of_transformers(layout: str, run_folder: Path, expected: list[list[int]]) -> None:
    ranks, overrides = LAYOUTS[layout]
    results = run_ranks(ranks, own_answers, run_folder, overrides)
    answering = [answers for answers in results if answers]
    assert all(answers == answering[0] for answers in answering)
    answers = answering[0]
    assert sorted(answer.index for answer, _ in answers) == list(range(SAMPLES))
    for answer, space in answers:
        assert answer.predicted == expected[answer.index][:space]


def test_the_reference_answers_prompts_differently(expected: list[list[int]]) -> None:
    assert len({tuple(ids) for ids in expected}) > SAMPLES // 2
    assert all(len(ids) == MAX_NEW_TOKENS for ids in expected)

"""A user's mistake ends the run on every rank with a typed error that names values and key, or is skipped and reported.

No case may hang: a rank that waits for another that has given up fails the test by its timeout.
"""

import json
import sys
from pathlib import Path

import pytest

from mimo_gemma4.errors import CheckpointError, ConfigError, DataError, LayoutError, NumericsError
from tests.dist.harness import run_ranks
from tests.e2e.training_runs import Outcome, step_records, train_on_rank, write_config
from tests.shard_maker import chat, jpeg, write_shard
from train_mimo import main

ANSWERS = ["one", "a", "seven", "three", "fourth", "no"]
BAD = 4
"""The sample that a test makes unusable."""


def write_data(folder: Path, *, truncated: bool = False, images_named: int = 1, question: str = "?") -> Path:
    """Six samples with an image each; the arguments spoil sample `BAD`."""
    members: dict[str, bytes] = {}
    for number, answer in enumerate(ANSWERS):
        bad = number == BAD
        picture = jpeg(96, 48, number)
        members[f"s{number}.json"] = chat(question if bad else "?", answer, *["image"] * (images_named if bad else 1))
        members[f"s{number}.0.jpg"] = picture[: len(picture) // 2] if bad and truncated else picture
    return write_shard(folder / "train.tar", members)


def run(folder: Path, shard: Path, *arguments: str, ranks: int = 2) -> list[Outcome]:
    return run_ranks(ranks, train_on_rank, [write_config(folder, shard), *arguments], timeout=60)


def assert_error(outcomes: list[Outcome], error: type, *parts: str) -> None:
    """The same error on every rank, with all parts in its message."""
    for outcome in outcomes:
        assert outcome.error is error, outcome
        for part in parts:
            assert part in outcome.message


def loss_tokens(folder: Path) -> list[int]:
    return [record["loss_tokens"] for record in step_records(folder / "run")]


def answer_tokens(*, without_bad: bool) -> int:
    """Every byte of an answer and its end of turn."""
    return sum(len(answer) + 1 for number, answer in enumerate(ANSWERS) if not (without_bad and number == BAD))


def test_good_data_trains_on_every_answer(tmp_path: Path) -> None:
    outcomes = run(tmp_path, write_data(tmp_path))
    assert outcomes == [Outcome(None, "", ())] * 2
    assert loss_tokens(tmp_path) == [answer_tokens(without_bad=False)] * 2


@pytest.mark.parametrize(
    ("argument", "error", "parts"),
    [
        (
            "data.train.shards={folder}/none-{{0..1}}.tar",
            DataError,
            ["data.train", "2 of 2 files", "{folder}/none-0.tar"],
        ),
        ("data.valid.shards={folder}/none.tar", DataError, ["data.valid", "1 of 1 files", "{folder}/none.tar"]),
        ("train.stepz=3", ConfigError, ["`train.stepz`", "did you mean `steps`?"]),
        ("train.steps=many", ConfigError, ["`train.steps` must be int, not 'many'", "argument `train.steps=many`"]),
        (
            "layout.language.ranks=3",
            LayoutError,
            [
                "4 ranks (vision 1 + language 3) but 2 were started",
                "torchrun --nproc-per-node 4 train_mimo.py config=…",
            ],
        ),
        ("layout.language.tp=3", LayoutError, ["`layout.language` has 1 ranks", "tp 3"]),
        ("model.hf_path={folder}/none", ConfigError, ["`model.hf_path`", "{folder}/none has no config.json"]),
        ("model.preset=gemma4_tinny", ConfigError, ["`model.preset`", "did you mean `gemma4_tiny`?"]),
        ("model.preset=gemma4_e2b", ConfigError, ["`model.preset` gemma4_e2b has the media tokens", "`model.hf_path`"]),
        (
            "checkpoint.resume={folder}/none",
            CheckpointError,
            ["checkpoint.resume: {folder}/none cannot be loaded: there is no such folder"],
        ),
        (
            "data.seq_length=20",
            DataError,
            ["train.tar hold no usable sample; the first left out", "more than data.seq_length=20"],
        ),
        ("modules.vision.freeze=['*.towr.*']", ConfigError, ["modules.vision.freeze: no parameter matches '*.towr.*'"]),
        (
            "modules={{vision: {{freeze: true}}, language: {{freeze: true}}}}",
            ConfigError,
            ["everything is frozen, so `train.steps` 2 would change nothing", "`modules.<module>.freeze`"],
        ),
        ("optim.lr=1.0e+30", NumericsError, ["step 2", "optim.lr"]),
    ],
)
def test_a_wrong_option_is_the_same_error_on_every_rank(
    tmp_path: Path, argument: str, error: type, parts: list[str]
) -> None:
    outcomes = run(tmp_path, write_data(tmp_path), argument.format(folder=tmp_path))
    assert_error(outcomes, error, *(part.format(folder=tmp_path) for part in parts))


def test_media_without_a_module_are_named(tmp_path: Path) -> None:
    shard = write_data(tmp_path)
    config = write_config(tmp_path, shard, layout={"language": {"ranks": 2}})
    outcomes = run_ranks(2, train_on_rank, [config], timeout=60)
    assert_error(outcomes, DataError, str(shard), "image", "layout")


def test_a_truncated_image_is_replaced_and_reported(tmp_path: Path) -> None:
    shard = write_data(tmp_path, truncated=True)
    outcomes = run(tmp_path, shard)
    assert [outcome.error for outcome in outcomes] == [None, None]
    reported = [line for outcome in outcomes for line in outcome.warnings]
    assert len(reported) == 1
    assert f"skipped {shard}: __key__ 's{BAD}': media 0 (image)" in reported[0]
    records = step_records(tmp_path / "run")
    assert [record["bad_samples"] for record in records] == [{"image": 1}] * 2
    # Six samples a step are one pass; in each, one of the five good answers is learned from twice.
    lengths = {len(answer) + 1 for number, answer in enumerate(ANSWERS) if number != BAD}
    assert {record["loss_tokens"] - answer_tokens(without_bad=True) for record in records} <= lengths
    [logged] = [json.loads(line) for line in (tmp_path / "run" / "bad_samples.jsonl").read_text().splitlines()]
    assert logged | {"reason": ""} == {"step": 1, "shard": str(shard), "key": f"s{BAD}", "fault": "image", "reason": ""}


@pytest.mark.parametrize("vision_first", [True, False])
def test_a_truncated_image_ends_the_run_if_asked(tmp_path: Path, vision_first: bool) -> None:
    """Whichever rank decodes it, every rank names the sample and the reason."""
    shard = write_data(tmp_path, truncated=True)
    order = ("vision", "language") if vision_first else ("language", "vision")
    config = write_config(tmp_path, shard, layout={name: {"ranks": [rank]} for rank, name in enumerate(order)})
    outcomes = run_ranks(2, train_on_rank, [config, "data.on_bad_sample=fail"], timeout=60)
    assert_error(outcomes, DataError, f"{shard}: __key__ 's{BAD}': media 0 (image): ", "data.on_bad_sample=skip")


MISMATCH = (
    "its messages name 2 image, 0 audio, 0 video frames, "
    "but its members ['0.jpg', 'json'] hold 1 image, 0 audio, 0 video frames"
)


def test_a_placeholder_without_its_image_is_skipped_and_reported(tmp_path: Path) -> None:
    shard = write_data(tmp_path, images_named=2)
    outcomes = run(tmp_path, shard, "train.global_batch_size=5")
    for outcome in outcomes:
        assert outcome.error is None
        assert outcome.warnings == (
            f"left out: {shard}: __key__ 's{BAD}': {MISMATCH}",
            "left out 1 of 6 samples in all (1 members)",
        )
    assert loss_tokens(tmp_path) == [answer_tokens(without_bad=True)] * 2


def test_a_placeholder_without_its_image_ends_the_run_if_asked(tmp_path: Path) -> None:
    shard = write_data(tmp_path, images_named=2)
    outcomes = run(tmp_path, shard, "data.on_bad_sample=fail")
    assert_error(outcomes, DataError, "1 of 6 samples", f"{shard}: __key__ 's{BAD}': {MISMATCH}", "data.on_bad_sample")


def test_too_many_unusable_samples_end_the_run(tmp_path: Path) -> None:
    outcomes = run(tmp_path, write_data(tmp_path, images_named=2), "data.max_bad_fraction=0")
    assert_error(outcomes, DataError, "1 of 6 samples", "data.max_bad_fraction=0", f"'s{BAD}'")


def test_a_sample_longer_than_a_sequence_is_skipped_and_reported(tmp_path: Path) -> None:
    shard = write_data(tmp_path, question="long" * 100)
    outcomes = run(tmp_path, shard, "train.global_batch_size=5")
    for outcome in outcomes:
        assert outcome.error is None
        assert f"left out: {shard}: __key__ 's{BAD}': " in outcome.warnings[0]
        assert "more than data.seq_length=300" in outcome.warnings[0]
    assert loss_tokens(tmp_path) == [answer_tokens(without_bad=True)] * 2


def test_a_sample_longer_than_a_sequence_ends_the_run_if_asked(tmp_path: Path) -> None:
    shard = write_data(tmp_path, question="long" * 100)
    outcomes = run(tmp_path, shard, "data.on_bad_sample=fail")
    assert_error(outcomes, DataError, f"'s{BAD}'", "more than data.seq_length=300", "raise data.seq_length")


def exit_code(rank: int, arguments: list[str], folder: Path) -> tuple[int, str]:
    """What the command returns, and what it writes to standard error."""
    path = folder / f"stderr.{rank}"
    with path.open("w") as sys.stderr:
        code = main(arguments)
    return code, path.read_text()


def test_the_command_reports_a_mistake_without_a_traceback(tmp_path: Path) -> None:
    """Which of several ranks prints: `test_errors_are_reported`."""
    config = write_config(tmp_path, write_data(tmp_path))
    [(code, printed)] = run_ranks(1, exit_code, [config, "train.stepz=3"], tmp_path, timeout=60)
    assert code == 1
    assert printed.startswith("\nConfigError: unknown key `train.stepz`") and "Traceback" not in printed

"""What a run writes: one JSON object per step, continued without gaps or doubles after a resume, and readable logs."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mimo_gemma4.config import Config, DataConfig, LayoutConfig, LoggingConfig, RunConfig, ShardsConfig, TrainConfig
from mimo_gemma4.errors import MissingPackageError
from mimo_gemma4.train.metrics import MetricsLog, flatten, format_step, plot_loss, read_records, save_samples


def make_config(directory: Path, tensorboard: bool = False, wandb: str | None = None, every: int = 5) -> Config:
    return Config(
        layout=LayoutConfig(),
        data=DataConfig(train=ShardsConfig("train.tar")),
        run=RunConfig(dir=str(directory)),
        train=TrainConfig(steps=12),
        logging=LoggingConfig(every=every, tensorboard=tensorboard, wandb=wandb),
    )


def make_record(step: int, **changes: Any) -> dict[str, Any]:
    record = {
        "step": step,
        "loss": 2.0 / step,
        "grad_norm": 0.5,
        "lr": 1e-3,
        "tokens": 100,
        "loss_tokens": 40,
        "tokens_per_second": 400.0,
        "step_seconds": 0.25,
        "modules": {
            "vision": {"lr": 1e-4, "grad_norm": 0.5, "mfu": None, "busy": 0.25, "wait": 0.5, "memory_gib": 1.5}
        },
    }
    return record | changes


def test_one_object_per_step_readable_at_once(tmp_path: Path):
    log = MetricsLog(make_config(tmp_path / "run"))
    for step in (1, 2, 3):
        log.step(make_record(step))
        lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == [make_record(number) for number in range(1, step + 1)]


def test_resuming_drops_what_will_be_trained_again(tmp_path: Path):
    log = MetricsLog(make_config(tmp_path))
    for step in range(1, 8):
        log.step(make_record(step))
        log.evaluation({"step": step, "loss": 1.0, "accuracy": 0.5, "items": 4, "per_modality": {}})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')  # killed in the middle of a line
    log = MetricsLog(make_config(tmp_path), first_step=5)
    log.step(make_record(5, loss=7.0))
    log.close()
    records = read_records(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5]
    assert records[-1]["loss"] == 7.0
    assert [record["step"] for record in read_records(tmp_path / "evaluations.jsonl")] == [1, 2, 3, 4]


def test_last_evaluation_is_eval_json(tmp_path: Path):
    log = MetricsLog(make_config(tmp_path))
    for step in (1, 2):
        log.evaluation(
            {"step": step, "loss": 1.0, "accuracy": 0.5, "items": 4, "per_modality": {"vision": {"loss": 1}}}
        )
    assert json.loads((tmp_path / "eval.json").read_text())["step"] == 2
    assert len(read_records(tmp_path / "evaluations.jsonl")) == 2


def test_not_a_number_stays_valid_json(tmp_path: Path):
    MetricsLog(make_config(tmp_path)).step(make_record(1, loss=math.nan, modules={"vision": {"busy": math.inf}}))

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    record = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert record["loss"] is None and record["modules"]["vision"]["busy"] is None


def test_log_lines_come_when_asked_with_means_since_the_last(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    log = MetricsLog(make_config(tmp_path))
    for step in range(1, 13):
        log.step(make_record(step, step_seconds=step / 10, tokens=100 * step))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["1/12", "5/12", "10/12", "12/12"]
    # Steps 6 to 10: mean of 0.6 … 1.0 seconds, always 1000 tokens a second, two steps of 0.8 s remain.
    assert "ms    800.0" in lines[2] and "tok/s     1,000" in lines[2] and lines[2].endswith("ETA 0:00:02")
    assert "vision busy  25% wait  50%" in lines[0]


def test_log_lines_are_aligned():
    lines = [
        format_step(make_record(step, loss=loss, grad_norm=norm), 1000, 0.1, speed)
        for step, loss, norm, speed in [(1, 12.5, 123.4, 10.0), (1000, 0.01, 0.001, 123456.0)]
    ]
    assert [line.index("grad_norm") for line in lines] == [lines[0].index("grad_norm")] * 2
    assert [line.index("ETA") for line in lines] == [lines[0].index("ETA")] * 2


def test_terminal_gets_a_bar_and_the_same_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    log = MetricsLog(make_config(tmp_path))
    log.step(make_record(1))
    log.close()
    assert format_step(make_record(1), 12, 0.25, 400.0) in capsys.readouterr().out


def test_tensorboard_has_every_number_once_after_a_resume(tmp_path: Path):
    for first, last in ((1, 4), (3, 5)):
        log = MetricsLog(make_config(tmp_path, tensorboard=True), first_step=first)
        for step in range(first, last + 1):
            log.step(make_record(step))
        log.evaluation({"step": last, "loss": 0.5, "accuracy": None, "items": 4, "per_modality": {}})
        log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5]
    assert events.Scalars("train/modules/vision/busy")[0].value == 0.25
    assert "eval/loss" in events.Tags()["scalars"] and "train/modules/vision/mfu" not in events.Tags()["scalars"]


def test_missing_wandb_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingPackageError, match=r"`logging.wandb` needs the package wandb.*mimo-gemma4\[wandb\]"):
        MetricsLog(make_config(tmp_path, wandb="project"))


def test_without_tensorboard_a_warning_is_logged_and_the_rest_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    log = MetricsLog(make_config(tmp_path, tensorboard=True))
    for step in (1, 2):
        log.step(make_record(step))
    log.close()
    [message] = caplog.messages
    assert "the package tensorboard" in message and "pip install 'mimo-gemma4[tensorboard]'" in message
    assert "logging.tensorboard=false" in message
    assert [record["step"] for record in read_records(tmp_path / "metrics.jsonl")] == [1, 2]
    assert not (tmp_path / "tensorboard").exists()


def test_flatten_keeps_numbers_only():
    assert flatten({"a": {"b": 1, "c": None}, "d": 2.5, "e": "text"}) == {"a/b": 1, "d": 2.5}


def test_pictures_are_drawn(tmp_path: Path):
    log = MetricsLog(make_config(tmp_path))
    for step in range(1, 5):
        log.step(make_record(step))
    without = tmp_path / "without.png"
    plot_loss(tmp_path / "metrics.jsonl", without)
    log.evaluation({"step": 4, "loss": 0.4, "accuracy": 1.0, "items": 1, "per_modality": {}})
    plot_loss(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    assert without.read_bytes() != (tmp_path / "loss.png").read_bytes()  # the evaluation is in the picture
    images = [Image.new("RGB", (8, 8), (value, 0, 0)) for value in range(0, 250, 25)]
    save_samples(images, ["$3"] * 10, ["3"] * 10, tmp_path / "samples.png")
    for name in ("loss.png", "samples.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.width > 100 and len(picture.convert("RGB").getcolors(1 << 24) or []) > 2


def test_a_bad_sample_is_written_once_and_again_only_if_its_step_is(tmp_path: Path):
    def bad(step: int | None, key: str) -> dict[str, Any]:
        return {"step": step, "shard": "a.tar", "key": key, "fault": "image", "reason": "cut"}

    log = MetricsLog(make_config(tmp_path))
    log.bad_samples([bad(None, "index")])
    log.bad_samples([bad(2, "early")])
    log.bad_samples([bad(7, "early"), bad(7, "late")])
    log.close()
    log = MetricsLog(make_config(tmp_path), first_step=5)
    log.bad_samples([bad(None, "index"), bad(6, "early"), bad(7, "late")])
    log.close()
    assert read_records(tmp_path / "bad_samples.jsonl") == [bad(2, "early"), bad(None, "index"), bad(7, "late")]


def test_the_log_line_shows_uneven_lanes_and_bad_samples_since_the_start(tmp_path: Path, capsys: Any):
    log = MetricsLog(make_config(tmp_path, every=2))
    even, uneven = {"before": 1.0, "after": 1.0}, {"before": 1.8, "after": 1.04}
    for step in (1, 2):
        log.step(make_record(step, bad_samples={"image": step}, imbalance={"vision": uneven, "language": even}))
    log.close()
    first, second = capsys.readouterr().out.splitlines()
    assert "uneven 1.80>1.04" in second and second.count("uneven") == 1
    assert first.endswith("bad samples 1") and second.endswith("bad samples 3")

"""A resumed run whose learning rate jumps says so; a schedule that goes on as it was says nothing."""

import json

import pytest

from mimo_gemma4.checkpoint.files import MARKER
from mimo_gemma4.config.options import (
    Config,
    DataConfig,
    LayoutConfig,
    ModuleConfig,
    ModuleLayout,
    OptimConfig,
    ShardsConfig,
    TrainConfig,
)
from mimo_gemma4.train.recorded_rates import record_rates, warn_of_jumps


def configuration(steps, vision_lr=None, **optim):
    return Config(
        layout=LayoutConfig({"vision": ModuleLayout(), "language": ModuleLayout()}),
        data=DataConfig(train=ShardsConfig("unused")),
        train=TrainConfig(steps=steps),
        optim=OptimConfig(**{"lr": 1e-3, "schedule": "linear", **optim}),
        modules={"vision": ModuleConfig(lr=vision_lr)},
    )


def warnings(tmp_path, caplog, step, before, now):
    state = {"step": step, "schedule": record_rates(before, step)}
    (tmp_path / MARKER).write_text(json.dumps({"trainer": state, "files": {}}))
    warn_of_jumps(now, tmp_path)
    return caplog.text


@pytest.mark.parametrize(
    ("step", "now", "parts"),
    [
        # Linear from 1e-3 at step 0 to 0 at step 100; of 200 steps, the 101st has 1e-3 * 99 / 200.
        (100, {"steps": 200}, ["language from 0 to 0.000495", "train.steps is 200, was 100", "after step 100"]),
        (50, {"steps": 200}, ["language from 0.0005 to 0.000745"]),
        (50, {"steps": 100, "lr": 2e-3}, ["vision from 0.0005 to 0.00098", "options of `optim`"]),
        (50, {"steps": 100, "schedule": "constant"}, ["language from 0.0005 to 0.001"]),
        (50, {"steps": 100, "warmup_steps": 60}, ["language from 0.0005 to 0.00085"]),
    ],
)
def test_a_rate_that_jumps_is_reported(tmp_path, caplog, step, now, parts):
    text = warnings(tmp_path, caplog, step, configuration(100), configuration(**now))
    assert all(part in text for part in parts), text


def test_only_the_module_whose_rate_jumps_is_named(tmp_path, caplog):
    text = warnings(tmp_path, caplog, 50, configuration(100), configuration(100, vision_lr=3e-3))
    assert "vision" in text and "language" not in text


@pytest.mark.parametrize(
    ("step", "before", "now"),
    [
        (50, {"steps": 100}, {"steps": 100}),
        (100, {"steps": 100}, {"steps": 100, "lr": 2e-3}),  # nothing left to do
        (100, {"steps": 100, "schedule": "constant"}, {"steps": 200, "schedule": "constant"}),
        (0, {"steps": 0}, {"steps": 200}),
        (100, {"steps": 100}, {"steps": 101}),  # 0 in step 100 as planned, and 0 in the new last step
    ],
)
def test_a_schedule_that_goes_on_says_nothing(tmp_path, caplog, step, before, now):
    assert not warnings(tmp_path, caplog, step, configuration(**before), configuration(**now))


def test_a_checkpoint_without_a_schedule_says_nothing(tmp_path, caplog):
    (tmp_path / MARKER).write_text(json.dumps({"trainer": {"step": 5}, "files": {}}))
    warn_of_jumps(configuration(10), tmp_path)
    assert not caplog.text

"""The learning rate is a pure function of the step: warm-up to the peak, then down to the floor at the last step."""

from dataclasses import replace

import pytest

from mimo_gemma4.config import Config, DataConfig, LayoutConfig, ModuleConfig, OptimConfig, ShardsConfig
from mimo_gemma4.optim.learning_rate import learning_rate


def rates(config: OptimConfig, steps: int) -> list[float]:
    return [learning_rate(config, step, steps) for step in range(1, steps + 1)]


def test_schedules():
    def config(schedule):
        return OptimConfig(lr=1.0, min_lr=0.1, schedule=schedule, warmup_steps=2)

    assert rates(config("constant"), 4) == [0.5, 1.0, 1.0, 1.0]
    assert rates(config("linear"), 5) == pytest.approx([0.5, 1.0, 0.7, 0.4, 0.1])
    assert rates(config("cosine"), 6) == pytest.approx([0.5, 1.0, 0.8681981, 0.55, 0.2318019, 0.1])


def test_edges():
    def config(peak):
        return OptimConfig(lr=peak, min_lr=0.1, schedule="linear")

    assert rates(config(0.04), 3) == pytest.approx([0.04] * 3)  # the floor never lies above the peak
    assert rates(config(0.0), 3) == [0.0] * 3
    assert rates(OptimConfig(lr=1.0, warmup_steps=4), 2) == [0.25, 0.5]  # the warm-up outlasts the run
    assert learning_rate(config(1.0), 9, 3) == pytest.approx(0.1)  # past the end


def test_modules_have_schedules_of_their_own():
    config = Config(
        LayoutConfig(),
        DataConfig(ShardsConfig("a.tar")),
        optim=OptimConfig(lr=1.0, min_lr=0.1, schedule="linear", weight_decay=0.3),
        modules={
            "vision": ModuleConfig(lr=0.5, schedule="constant", warmup_steps=2, weight_decay=0.0),
            "audio": ModuleConfig(min_lr=0.0),
        },
    )
    assert rates(config.module_optim("vision"), 4) == [0.25, 0.5, 0.5, 0.5]
    assert rates(config.module_optim("audio"), 4) == pytest.approx([0.75, 0.5, 0.25, 0.0])
    assert rates(config.module_optim("language"), 4) == pytest.approx([0.775, 0.55, 0.325, 0.1])
    assert config.module_optim("vision") == replace(
        config.optim, lr=0.5, schedule="constant", warmup_steps=2, weight_decay=0.0
    )
    assert config.module_optim("language") == config.optim

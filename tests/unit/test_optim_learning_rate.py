"""The learning rate is a pure function of the step: warm-up to the peak, then down to the floor at the last step."""

import pytest

from mimo_gemma4.config import OptimConfig
from mimo_gemma4.optim import learning_rate


def rates(config: OptimConfig, steps: int, peak: float | None = None) -> list[float]:
    return [learning_rate(config, step, steps, peak) for step in range(1, steps + 1)]


def test_schedules():
    def config(schedule):
        return OptimConfig(lr=1.0, min_lr=0.1, schedule=schedule, warmup_steps=2)

    assert rates(config("constant"), 4) == [0.5, 1.0, 1.0, 1.0]
    assert rates(config("linear"), 5) == pytest.approx([0.5, 1.0, 0.7, 0.4, 0.1])
    assert rates(config("cosine"), 6) == pytest.approx([0.5, 1.0, 0.8681981, 0.55, 0.2318019, 0.1])


def test_module_peak_and_edges():
    config = OptimConfig(lr=1.0, min_lr=0.1, schedule="linear")
    assert rates(config, 3, peak=0.04) == pytest.approx([0.04] * 3)  # the floor never lies above the peak
    assert rates(config, 3, peak=0.0) == [0.0] * 3
    assert rates(OptimConfig(lr=1.0, warmup_steps=4), 2) == [0.25, 0.5]  # the warm-up outlasts the run
    assert learning_rate(config, 9, 3) == pytest.approx(0.1)  # past the end

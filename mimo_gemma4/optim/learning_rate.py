"""The learning rate of every step, per module."""

import math

from mimo_gemma4.config import OptimConfig


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """Learning rate of optimizer step `step` (the first is 1) out of `steps`: a pure function of its arguments.

    It rises linearly to `config.lr` over `config.warmup_steps`, then follows `config.schedule` down to `config.min_lr`,
    reached at the last step (cosine: Loshchilov and Hutter 2017, without restarts). A peak below the floor stays.

    Args:
        config: the module's options (`Config.module_optim`).
        step: number of the step.
        steps: `train.steps`.
    """
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = min(1.0, (step - config.warmup_steps) / max(1, steps - config.warmup_steps))
    remaining = 1.0 - progress if config.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    floor = min(config.min_lr, config.lr)
    return floor + (config.lr - floor) * remaining

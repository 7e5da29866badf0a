"""Notices a learning rate that jumps where a run resumes."""

import logging
import math
from pathlib import Path
from typing import Any

from mimo_gemma4.checkpoint.files import read_marker
from mimo_gemma4.config import Config
from mimo_gemma4.optim.learning_rate import learning_rate

logger = logging.getLogger(__name__)

_JUMP = 0.01
"""Smallest relative change of a learning rate that counts as a jump."""


def rates(config: Config, step: int) -> dict[str, float]:
    """Learning rate of every module of the layout in a step, counted from 1."""
    steps = config.train.steps
    return {name: learning_rate(config.module_optim(name), step, steps) for name in config.layout.modules}


def record_rates(config: Config, step: int) -> dict[str, Any]:
    """What a checkpoint after `step` steps records of the schedule, as JSON."""
    return {"steps": config.train.steps, "rates": rates(config, step) if step else {}}


def warn_of_jumps(config: Config, path: Path) -> None:
    """Log a warning where a run that resumes from the checkpoint `path` has another schedule, and its rate jumps.

    Nothing is said where `train.steps` leaves nothing to do.
    """
    marker = read_marker(path)
    if isinstance(marker, str) or "schedule" not in marker["trainer"]:
        return  # loading reports a damaged checkpoint
    step, recorded = marker["trainer"]["step"], marker["trainer"]["schedule"]
    if not 0 < step < config.train.steps:
        return
    expected, following = rates(config, step), rates(config, step + 1)
    jumps = [
        f"{name} from {old:.3g} to {following[name]:.3g}"
        for name, old in recorded["rates"].items()
        if name in expected
        and not any(math.isclose(old, rate, rel_tol=_JUMP) for rate in (expected[name], following[name]))
    ]
    if jumps:
        was, steps = recorded["steps"], config.train.steps
        why = f"train.steps is {steps}, was {was}" if steps != was else "options of `optim` or `modules` have changed"
        logger.warning(
            f"checkpoint.resume: the learning rate jumps after step {step}: {'; '.join(jumps)} ({why}). To train on "
            "with a schedule of its own, start a new run by checkpoint.init_from"
        )

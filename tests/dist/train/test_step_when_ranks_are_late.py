"""Every rank does what the schedule plans for it, in that order, and how long ranks take changes nothing in the result.

Ranks wait at random before each action. What they should have done follows here, in a process that took no part, from
layout and manifest; the result is held against one process as in `test_step_gradient_parity`.
"""

import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mimo_gemma4.config import load_config
from mimo_gemma4.data.loader import StepLoader
from mimo_gemma4.data.manifest import StepManifest
from mimo_gemma4.distributed.layout import build_layout
from mimo_gemma4.train.schedule import Action, plan_step
from mimo_gemma4.train.step import _Execution
from tests.dist.harness import run_ranks
from tests.dist.train import test_decoder_gradient_parity as decoders
from tests.dist.train import test_step_gradient_parity as parity
from tests.dist.train.step_parity import Case, Prepared, deviation, step_on_rank

images, colours = parity.images, decoders.colours

WITH_IMAGES = [
    Case(pp=3, dp=2, part=True, sequences=1),
    Case(colocated=True, vision_pp=2, dp=2, pp=2, sequences=1),
    Case(vision_pp=2, pp=3, part=True, sequences=1, ranks=((1, 2), (0, 1, 2))),
]
WITH_DECODERS = [
    Case(pixels=2, pp=2, sequences=1),
    Case(pixels=1, pp=2, sequences=1, ranks=((1,), (0, 1), (0,))),
]


@dataclass(frozen=True)
class LateStep:
    """A step as one rank did it."""

    result: tuple[dict, list]
    """As `step_on_rank` gives it."""
    manifest: StepManifest
    done: list[Action]


def late_step(rank: int, folder: Path, overrides: list[str]) -> LateStep:
    done: list[Action] = []
    manifests: list[StepManifest] = []
    perform, load, choose = _Execution.perform, StepLoader.load, random.Random(rank)

    def perform_late(self: _Execution, action: Action) -> None:
        time.sleep(choose.choice([0.0, 0.0, 0.01, 0.05]))
        perform(self, action)
        done.append(action)

    def noted(self: StepLoader, step: int) -> Any:
        data = load(self, step)
        manifests.append(data.manifest)
        return data

    _Execution.perform, StepLoader.load = perform_late, noted
    result = step_on_rank(rank, folder, overrides)
    [manifest] = manifests
    return LateStep(result, manifest, done)


def check(case: Case, prepared: Prepared) -> None:
    steps = run_ranks(case.world, late_step, prepared.folder, case.overrides)
    config = load_config([f"config={prepared.folder}/run.yaml", *case.overrides])
    layout = build_layout(config.layout, case.world)
    trained_from = dict.fromkeys((*layout.encoders, *layout.decoders), 0)  # everything trains
    run_ahead = {name: config.module(name).run_ahead for name in layout.encoders}
    for rank, step in enumerate(steps):
        planned = plan_step(layout, steps[0].manifest, rank, trained_from=trained_from, run_ahead=run_ahead)
        assert step.done == planned and len(planned) > 3, f"rank {rank}"
    assert deviation(case, [step.result for step in steps], prepared.reference) is None


@pytest.mark.parametrize("case", WITH_IMAGES, ids=str)
def test_encoders_and_stages(case: Case, images: Prepared) -> None:
    check(case, images)


@pytest.mark.parametrize("case", WITH_DECODERS, ids=str)
def test_decoders(case: Case, colours: Prepared) -> None:
    check(case, colours)

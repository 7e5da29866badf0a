"""In steady state the host waits for the results of the step before and for the row counts of experts, no more.

Whole training steps in bf16 (packed, clipped, skipped) run under `torch.cuda.set_sync_debug_mode("error")`, in which a
blocking copy, a blocking read of a value and a wait for a stream raise, in every thread of the process. That mode lets
pass waits for an event, which are counted here, and for the whole device, which are forbidden here. All layouts run on
as many ranks as there are GPUs (1, 2 or 4), in the same processes, because starting those takes longest.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from mimo_gemma4.config import load_config
from mimo_gemma4.errors import NumericsError
from mimo_gemma4.train.build import build_trainer
from mimo_gemma4.train.setup import set_up_run
from mimo_gemma4.train.step import StepTotals
from mimo_gemma4.train.trainer import Trainer
from tests.dist.harness import run_ranks
from tests.dist.train.step_parity import Case, write_run
from tests.dist.train.test_expert_lanes import TEXT
from tests.vlm_reference import SAMPLES

pytestmark = pytest.mark.gpu

WARM_UP, STEADY = 8, 3
"""Every step takes all samples: after the warm-up all shapes have been met, and kernels been compiled for them."""
LAYOUTS = {
    1: [Case(colocated=True, packing=True, sequences=1)],
    2: [
        Case(vision=1, packing=True, sequences=1),
        Case(colocated=True, tp=2, sp=True, packing=True, sequences=1),
        Case(colocated=True, pp=2, packing=True, sequences=1),
    ],
    4: [
        Case(colocated=True, tp=2, pp=2, sp=True, packing=True, sequences=1),
        Case(vision=2, tp=2, sp=True, packing=True, sequences=1),
        Case(vision=2, cp=2, packing=True, sequences=1),
    ],
}
EXPERTS = {
    1: Case(colocated=True, packing=True, sequences=1),
    2: Case(colocated=True, dp=2, ep=2, packing=True, sequences=1),
    4: Case(colocated=True, dp=2, tp=2, sp=True, ep=2, packing=True, sequences=1),
}
GPUS = max((count for count in LAYOUTS if count <= torch.cuda.device_count()), default=1)


@contextmanager
def no_blocking_reads() -> Iterator[list[torch.cuda.Event]]:
    """Raise on waits for streams and the device; the events that the host waits for."""
    waited: list[torch.cuda.Event] = []
    wait, wait_for_all = torch.cuda.Event.synchronize, torch.cuda.synchronize

    def counted(event: torch.cuda.Event) -> None:
        waited.append(event)
        wait(event)

    def forbidden(*_: Any) -> None:
        raise RuntimeError("a step waits for the whole device")

    torch.cuda.Event.synchronize, torch.cuda.synchronize = counted, forbidden
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield waited
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.Event.synchronize, torch.cuda.synchronize = wait, wait_for_all


@contextmanager
def trainer_of(folder: Path, case: Case) -> Iterator[Trainer]:
    """A trainer of the layout in bf16; its groups are torn down in the end."""
    options = ["model.precision=bf16", "train.steps=100", f"train.global_batch_size={SAMPLES}"]
    setup = set_up_run(load_config([f"config={folder}/run.yaml", *case.overrides, *options]))
    trainer = build_trainer(setup)
    yield trainer
    trainer.close()
    torch.cuda.synchronize()
    setup.groups.destroy()


def main_weights(trainer: Trainer) -> list[torch.Tensor]:
    shards = [shard for optimizer in trainer.optimizers.values() for shard in optimizer.trainable_shards]
    return [shard.state["main_weight"].clone() for shard in shards]


def steps_rank(rank: int, runs: list[tuple[Path, Case]]) -> list[tuple[int, int]]:
    """By run: events that the host waited for in steady steps, and those that experts account for."""
    found = []
    for folder, case in runs:
        with trainer_of(folder, case) as trainer:
            for _ in range(WARM_UP):
                trainer.train_step()
            with no_blocking_reads() as waited:
                for _ in range(STEADY):
                    trainer.train_step()
            language = trainer.model.language
            microbatches = sum(trainer.loader.planner.plan(WARM_UP + step).num_microbatches for step in range(STEADY))
            cut = language is not None and trainer.model.layout.language.ep > 1
            found.append((len(waited), len(language.layers) * microbatches if language is not None and cut else 0))
            check_a_read_is_caught(trainer)
            check_skipped_step(trainer)
    return found


def check_a_read_is_caught(trainer: Trainer) -> None:
    """The same step raises where it reads its loss."""
    run = trainer.runner.run

    def reading(*arguments: Any, **options: Any) -> StepTotals:
        totals = run(*arguments, **options)
        totals.loss_sum.item()
        return totals

    trainer.runner.run = reading
    with no_blocking_reads(), pytest.raises(RuntimeError, match="synchronizing CUDA operation"):
        trainer.train_step()
    trainer.runner.run = run


def check_skipped_step(trainer: Trainer) -> None:
    """A step with a gradient that is not finite changes nothing, which the host learns one step later."""
    before = main_weights(trainer)
    poisoned = next(iter(trainer.optimizers.values())).trainable_shards[0].tensor
    with no_blocking_reads(), torch.no_grad():
        poisoned.fill_(float("inf"))
        trainer.train_step()
    after = main_weights(trainer)
    assert len(before) == len(after) and all(map(torch.equal, before, after))
    with pytest.raises(NumericsError):
        trainer.train_step()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[list[tuple[int, int]]]:
    """What each rank found: by layout, the one with experts last."""
    dense, experts = tmp_path_factory.mktemp("dense"), tmp_path_factory.mktemp("experts")
    write_run(dense)
    write_run(experts, **TEXT)
    runs = [*((dense, case) for case in LAYOUTS[GPUS]), (experts, EXPERTS[GPUS])]
    return run_ranks(GPUS, steps_rank, runs, backend="nccl", timeout=280)


@pytest.mark.parametrize("number", range(len(LAYOUTS[GPUS])))
def test_steps_wait_for_nothing(number: int, outcomes: list[list[tuple[int, int]]]) -> None:
    assert [waited for waited, _ in (layouts[number] for layouts in outcomes)] == [STEADY] * GPUS


def test_steps_wait_for_the_token_counts_of_experts_alone(outcomes: list[list[tuple[int, int]]]) -> None:
    for layouts in outcomes:
        waited, experts = layouts[-1]
        assert waited == STEADY + experts

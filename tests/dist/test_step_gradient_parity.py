"""One global step has the loss and the gradients that transformers computes in one process, whatever the layout.

Compared before clipping and before the optimizer, in fp32. The tolerance is the project's "to 1e-5" of a gradient:
for every parameter the norm of the difference is at most 1e-5 of the parameter's gradient norm plus 1e-7 of the norm
of the whole gradient. Sums in another order differ by a few fp32 roundings (6e-8 each); attention amplifies them.
"""

import os
import random
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mimo_gemma4.bridge import Bridge
from mimo_gemma4.build import Foundation, build_trainer
from mimo_gemma4.config import load_config
from mimo_gemma4.layout import build_layout
from mimo_gemma4.platform import create_platform
from mimo_gemma4.presets import load_model_config
from mimo_gemma4.process_groups import create_process_groups
from mimo_gemma4.schedule import Action
from mimo_gemma4.step import StepRunner, _Execution
from tests.dist.harness import run_ranks
from tests.vlm_reference import Reference, huggingface_step, write_model, write_shards

BATCH, SEED, STEP = 7, 11, 1


@dataclass(frozen=True)
class Case:
    """A layout: data parallel sizes of vision, sizes of language, and how the batch is cut."""

    vision: int = 1
    vision_tp: int = 1
    dp: int = 1
    tp: int = 1
    cp: int = 1
    sp: bool = False
    rows: int = 2
    packing: bool = False
    colocated: bool = False
    ep: int = 1
    checkpointing: str = "none"
    pp: int = 1
    part: bool = False

    @property
    def world(self) -> int:
        language = self.dp * self.tp * self.cp * self.pp
        return language if self.colocated else self.vision * self.vision_tp + language

    @property
    def overrides(self) -> list[str]:
        vision = f"ranks: {self.vision * self.vision_tp}, tp: {self.vision_tp}"
        language = f"tp: {self.tp}, cp: {self.cp}, pp: {self.pp}, ep: {self.ep}"
        language += f", part_shared_key_values: {str(self.part).lower()}"
        if self.colocated:
            vision = f"tp: {self.vision_tp}"
        else:
            language = f"ranks: {self.dp * self.tp * self.cp * self.pp}, {language}"
        return [
            f"layout.vision={{{vision}}}",
            f"layout.language={{{language}, sequence_parallel: {str(self.sp).lower()}}}",
            f"layout.placement={'colocated' if self.colocated else 'disjoint'}",
            f"train.microbatch_size={self.rows}",
            f"data.packing={str(self.packing).lower()}",
            f"train.activation_checkpointing={self.checkpointing}",
        ]


# A pairwise cover of the sizes in the table below: every two values of two columns meet in some row.
QUICK = [
    Case(colocated=True),
    Case(vision=3, dp=2, rows=1),
    Case(vision=2, dp=3),
    Case(vision=2, tp=2, sp=True),
    Case(vision=1, tp=2, dp=2, rows=3),
    Case(vision=2, cp=2, packing=True),
    Case(vision=2, dp=1, tp=2, cp=2, sp=True, packing=True),
    Case(vision=1, vision_tp=2, dp=2, cp=2, rows=1),
    Case(colocated=True, dp=2, tp=2, sp=True, packing=True, rows=1),
    Case(vision=1, pp=2, rows=1),
    Case(vision=1, pp=2, tp=2, sp=True, packing=True),
    Case(vision=2, pp=3, dp=2, part=True, rows=1),
    Case(colocated=True, pp=4, rows=7, part=True),
]
COMPLETE = [
    Case(vision, vision_tp, dp, tp, cp, sp, rows, packing)
    for vision, vision_tp in ((1, 1), (2, 1), (3, 1), (1, 2))
    for dp in (1, 2, 3)
    for tp, sp in ((1, False), (2, False), (2, True))
    for cp in (1, 2)
    for rows, packing in ((1, False), (3, False), (2, True))
    if vision * vision_tp + dp * tp * cp <= 8 and not (packing and rows == 1)
]
STAGES = [
    Case(vision, 1, dp, tp, cp, sp, rows, packing, pp=pp, part=pp > 2)
    for vision in (1, 2)
    for pp, dp, tp, cp, sp in (
        *((2, 1, 1, 1, False), (2, 2, 1, 1, False), (2, 3, 1, 1, False), (2, 1, 2, 1, False), (2, 1, 2, 1, True)),
        *((2, 1, 1, 2, False), (2, 1, 1, 3, False), (3, 1, 1, 1, False), (3, 2, 1, 1, False), (3, 1, 2, 1, True)),
        *((3, 1, 1, 2, False), (4, 1, 1, 1, False), (5, 1, 1, 1, False), (6, 1, 1, 1, False)),
    )
    for rows, packing in ((1, False), (3, False), (7, False), (1, True))
] + [
    Case(1, vision_tp, dp, tp, cp, sp, rows, packing, colocated=True, pp=pp, part=pp > 2)
    for vision_tp in (1, 2)
    for pp, dp, tp, cp, sp in ((2, 1, 1, 1, False), (2, 2, 2, 1, True), (2, 2, 1, 2, False), (4, 1, 2, 1, True))
    for rows, packing in ((1, False), (7, False), (1, True))
]
"""Pipelines with more and with fewer microbatches than stages; idle lanes; the cut between shared keys and values."""


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("parity"))


def write_run(folder: Path, **text: Any) -> Path:
    """A model, whose `text_config` has these values, shards and a configuration."""
    write_model(folder / "model", **text)
    write_shards(folder)
    (folder / "run.yaml").write_text(
        f"""
        run: {{dir: {folder}/run, seed: {SEED}}}
        model: {{hf_path: {folder}/model, precision: fp32}}
        layout: {{vision: {{}}, language: {{}}}}
        data: {{train: {{shards: "{folder}/train-000000.tar"}}, seq_length: 300}}
        train: {{global_batch_size: {BATCH}}}
        logging: {{tensorboard: false}}
        """
    )
    return folder


@pytest.fixture(scope="module")
def reference(run_folder: Path) -> Reference:
    return run_ranks(1, _reference_rank, run_folder)[0]


def _reference_rank(rank: int, folder: Path) -> Reference:
    return huggingface_step(folder / "model", folder / "train-000000.tar", STEP, BATCH, SEED)


def step_on_rank(rank: int, folder: Path, overrides: list[str]) -> tuple[dict, list]:
    """The step's results, and this rank's pieces of the gradient: (name, shape, index, values)."""
    config = load_config([f"config={folder}/run.yaml", *overrides])
    config.run.dir = f"{config.run.dir}/{os.getppid()}"
    platform = create_platform()
    layout = build_layout(config.layout, dist.get_world_size())
    groups = create_process_groups(layout, platform)
    trainer = build_trainer(Foundation(config, load_model_config(config.model, config.modules), layout, platform, groups))
    data = trainer.loader.load(STEP)
    for optimizer in trainer.optimizers.values():
        optimizer.zero_gradients()
    totals = trainer.runner.run(data)
    for optimizer in trainer.optimizers.values():
        optimizer.finish_gradients()
    agreement = trainer.agree(totals, data)
    pieces = []
    for optimizer in trainer.optimizers.values():
        trainable = [parameter for parameter in optimizer.module.parameters() if parameter.requires_grad]
        whole = {id(parameter): torch.zeros(parameter.numel(), device=platform.device) for parameter in trainable}
        for shard in optimizer.trainable_shards:
            whole[id(shard.tensor)][shard.start : shard.end] = shard.gradient
        for parameter in trainable:  # ZeRO-1 shards of the replicas make one gradient
            replicas = optimizer.groups.dp_cp if getattr(parameter, "allreduce", True) else optimizer.groups.expt_dp
            dist.all_reduce(whole[id(parameter)], group=replicas)
        for binding in optimizer.owned:
            if id(binding.tensor) in whole:
                local = whole[id(binding.tensor)].view(binding.tensor.shape)
                values = binding.view(local) / agreement.loss_tokens
                pieces.append((binding.name, binding.shape, binding.index, values.float().cpu().clone()))
    trainer.loader.close()
    result = {name: float(getattr(agreement, name)) for name in ("loss", "loss_tokens", "grad_norm")}
    result["hashes"] = agreement.hash_difference.abs().sum().item()
    groups.destroy()
    return result, pieces


def worst_gradient(results: list, reference: Reference) -> tuple[float, str]:
    """The largest ratio of a parameter's deviation to its tolerance, and the parameter."""
    gradients = {name: torch.full_like(g, float("nan")) for name, g in reference.gradients.items()}
    for _, pieces in results:
        for name, shape, index, values in pieces:
            assert tuple(gradients[name].shape) == tuple(shape), name
            gradients[name][index] = values
    ratios = {}
    for name, expected in reference.gradients.items():
        deviation = float((gradients[name] - expected).norm())
        ratios[name] = deviation / (1e-5 * float(expected.norm()) + 1e-7 * reference.norm)
    name = max(ratios, key=lambda key: float("inf") if ratios[key] != ratios[key] else ratios[key])
    return ratios[name], name


def check(case: Case, run_folder: Path, reference: Reference, backend: str = "gloo") -> None:
    results = run_ranks(case.world, step_on_rank, run_folder, case.overrides, backend=backend)
    outcome = results[0][0]
    assert all(result == outcome for result, _ in results)
    assert outcome["hashes"] == 0
    assert outcome["loss_tokens"] == reference.loss_tokens
    assert outcome["loss"] == pytest.approx(reference.loss, rel=1e-5)
    ratio, name = worst_gradient(results, reference)
    print(f"{case}: worst gradient {ratio:.2f} of its tolerance ({name})")
    assert ratio <= 1.0, f"{name} deviates by {ratio:.2f} times its tolerance"
    assert outcome["grad_norm"] == pytest.approx(reference.norm, rel=1e-5)


@pytest.mark.parametrize("case", QUICK, ids=str)
def test_quick_cover(case: Case, run_folder: Path, reference: Reference) -> None:
    check(case, run_folder, reference)


@pytest.mark.slow
@pytest.mark.parametrize("case", COMPLETE + STAGES, ids=str)
def test_complete_table(case: Case, run_folder: Path, reference: Reference) -> None:
    check(case, run_folder, reference)


def test_ranks_do_what_was_planned_and_agree_however_late_they_are(run_folder: Path, reference: Reference) -> None:
    case = Case(vision=1, pp=3, dp=2, part=True, rows=1)
    results = run_ranks(case.world, delayed_step, run_folder, case.overrides)
    for (_, _), done, planned in results:
        assert done == planned and len(done) > 10
    ratio, name = worst_gradient([result for result, _, _ in results], reference)
    assert ratio <= 1.0, f"{name} deviates by {ratio:.2f} times its tolerance"


def delayed_step(rank: int, folder: Path, overrides: list[str]) -> tuple[tuple[dict, list], list[Action], list[Action]]:
    """The step on a rank that dawdles, the actions that it did, and those that were planned for it."""
    done: list[Action] = []
    planned: list[Action] = []
    perform, plan, choose = _Execution.perform, StepRunner.plan, random.Random(rank)

    def late(self: _Execution, action: Action) -> None:
        time.sleep(choose.choice([0.0, 0.0, 0.01, 0.05]))
        perform(self, action)
        done.append(action)

    def noted(self: StepRunner, *arguments: Any, **options: Any) -> list[Action]:
        planned.extend(plan(self, *arguments, **options))
        return list(planned)

    _Execution.perform, StepRunner.plan = late, noted
    return step_on_rank(rank, folder, overrides), done, planned


@pytest.mark.parametrize("mutation", ["dropped", "counted twice"])
def test_one_wrong_row_gradient_is_caught(mutation: str, run_folder: Path, reference: Reference) -> None:
    case = replace(QUICK[2], rows=3)
    results = run_ranks(case.world, mutated_step, run_folder, case.overrides, 0.0 if mutation == "dropped" else 2.0)
    ratio, _ = worst_gradient(results, reference)
    assert ratio > 1.0


def mutated_step(rank: int, folder: Path, overrides: list[str], factor: float) -> tuple[dict, list]:
    original, done = Bridge.backward, []

    def backward(self: Bridge, route, gradients, rows):  # noqa: ANN001, ANN202
        if gradients is not None and rank == 2 and not done:
            gradients = gradients.clone()
            gradients[0] *= factor
            done.append(True)
        return original(self, route, gradients, rows)

    Bridge.backward = backward
    return step_on_rank(rank, folder, overrides)

"""A model whose experts are cut over lanes trains, answers and is saved like one that is whole, idle lanes included.

Seven samples in microbatches of one sequence leave a lane without any in the last microbatch, with two lanes and with
four. Tolerances of the gradients: those of `step_parity`, whose checks these are.
"""

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from mimo_gemma4.checkpoint import save_load as checkpoint
from mimo_gemma4.config import load_config
from mimo_gemma4.train.build import build_trainer
from mimo_gemma4.train.setup import set_up_run
from mimo_gemma4.train.trainer import Trainer
from tests.dist.checkpoint.test_resume import same_bits, whole_tensors
from tests.dist.harness import run_ranks
from tests.dist.train.step_parity import BATCH, Case, Prepared, check, prepare, write_run
from tests.dist.train.test_greedy_answers_match_transformers import own_answers, transformers_answers
from tests.vlm_reference import SAMPLES

TEXT: dict[str, Any] = dict(
    enable_moe_block=True,
    num_experts=8,
    top_k_experts=2,
    moe_intermediate_size=24,
    attention_k_eq_v=True,
    num_global_key_value_heads=1,
    num_kv_shared_layers=0,
    use_double_wide_mlp=False,
    hidden_size_per_layer_input=0,
    use_bidirectional_attention="vision",
)
CASES = [
    Case(dp=2, ep=2, sequences=1),
    Case(dp=4, ep=4, sequences=1, checkpointing="full"),
    Case(dp=2, tp=2, ep=2, sequences=1, checkpointing="full"),
    Case(dp=2, cp=2, ep=4, sequences=1),
    Case(dp=2, tp=2, sp=True, ep=2, sequences=1, packing=True, colocated=True),
    Case(dp=2, pp=2, ep=2, sequences=1, checkpointing="full"),
]
EP2 = Case(dp=2, ep=2, sequences=1)
WHOLE = Case(colocated=True)
OTHER = Case(tp=2, dp=2, ep=2, sequences=1, colocated=True)


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepare(tmp_path_factory.mktemp("experts"), partial(write_run, **TEXT))


@pytest.mark.parametrize("world", sorted({case.world for case in CASES}))
def test_step_gradients(world: int, experts: Prepared) -> None:
    check((case, experts) for case in CASES if case.world == world)


def test_answers(experts: Prepared) -> None:
    """The last three samples leave one lane of four idle; the answers of the others end with their sequences."""
    expected = run_ranks(1, transformers_answers, experts.folder)[0]
    overrides = [
        *Case(dp=4, ep=4, sequences=1).overrides,
        f"data.valid={{shards: {experts.folder}/train-000000.tar}}",
        f"eval.batch_size={BATCH}",
    ]
    found = {
        answer.index: (answer.predicted, space)
        for answers in run_ranks(5, own_answers, experts.folder, overrides)
        for answer, space in answers
    }
    assert sorted(found) == list(range(SAMPLES))
    for index, (predicted, space) in found.items():
        assert predicted == expected[index][:space]


def trainer_of(folder: Path, case: Case) -> Trainer:
    return build_trainer(set_up_run(load_config([f"config={folder}/run.yaml", *case.overrides])))


def saved(folder: Path, trainer: Trainer) -> Path:
    trainer.loader.close()
    return checkpoint.save(folder, 1, trainer.optimizers, {"step": 1}, host=trainer.model.groups.host)


def train_and_save(rank: int, folder: Path, target: Path, case: Case) -> None:
    trainer = trainer_of(folder, case)
    trainer.train_step()
    saved(target, trainer)


def load_and_save(rank: int, folder: Path, source: Path, target: Path, case: Case) -> None:
    trainer = trainer_of(folder, case)
    for optimizer in trainer.optimizers.values():
        for binding in optimizer.bindings:
            binding.view().detach().zero_()
    checkpoint.load(source, trainer.optimizers, host=trainer.model.groups.host)
    saved(target, trainer)


def test_checkpoints_change_their_expert_parallel_size(tmp_path: Path, experts: Prepared) -> None:
    run_ranks(EP2.world, train_and_save, experts.folder, tmp_path / "ep2", EP2)
    written = whole_tensors(tmp_path / "ep2" / "step_00000001")
    of_experts = {key: value for key, value in written.items() if "experts" in key}
    assert {key.split(".")[1] for key in of_experts} == {"weight", "exp_avg", "exp_avg_sq"}
    assert all(value.count_nonzero() > value.numel() // 2 for value in of_experts.values())
    for name, case in (("whole", WHOLE), ("other", OTHER)):
        run_ranks(case.world, load_and_save, experts.folder, tmp_path / "ep2" / "step_00000001", tmp_path / name, case)
        assert same_bits(written, whole_tensors(tmp_path / name / "step_00000001"))

"""The distributed tests again, on NCCL: the same functions as on gloo, with as many ranks as there are GPUs (up to 8).

pytest -m gpu
"""

from pathlib import Path

import pytest
import torch

from tests.dist import test_bridge_rows as bridge
from tests.dist import test_expert_lanes as experts
from tests.dist import test_partition_content as partition
from tests.dist import test_step_gradient_parity as parity
from tests.dist.harness import run_ranks
from tests.vlm_reference import Reference

pytestmark = pytest.mark.gpu
GPUS = min(8, torch.cuda.device_count())

run_folder, reference = parity.run_folder, parity.reference  # the fixtures of the gloo tests


@pytest.fixture(scope="module")
def experts_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return parity.write_run(tmp_path_factory.mktemp("experts"), **experts.TEXT)


@pytest.fixture(scope="module")
def experts_reference(experts_folder: Path) -> Reference:
    return run_ranks(1, experts.reference_rank, experts_folder)[0]


def test_partition_content() -> None:
    run_ranks(GPUS, partition.sharding_rank, backend="nccl")


ROW_CASES = [case for case in bridge.CASES if case[0] + case[2] in (GPUS, GPUS - 1)]


@pytest.mark.parametrize("case", ROW_CASES, ids=str)
def test_rows_arrive_and_gradients_return_once(case: tuple) -> None:
    run_ranks(case[0] + case[2], bridge.bridge_rank, case, [0, 1, 2], backend="nccl")


CASES = [case for case in parity.QUICK if case.world <= GPUS]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_step_gradients(case: parity.Case, run_folder: Path, reference: Reference) -> None:
    """The reference is computed on the CPU, so GPU kernels' own rounding is inside the tolerance too."""
    parity.check(case, run_folder, reference, backend="nccl")


EXPERT_CASES = [case for case in experts.CASES if case.world <= GPUS]


@pytest.mark.parametrize("case", EXPERT_CASES, ids=str)
def test_step_gradients_with_experts(case: parity.Case, experts_folder: Path, experts_reference: Reference) -> None:
    parity.check(case, experts_folder, experts_reference, backend="nccl")

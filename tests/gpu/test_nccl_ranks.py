"""The distributed tests again, on NCCL: the same functions as on gloo, with as many ranks as there are GPUs (up to 8).

pytest -m gpu
"""

import pytest
import torch

from tests.dist import test_bridge_rows as bridge
from tests.dist import test_expert_lanes as experts_lanes
from tests.dist import test_partition_content as partition
from tests.dist import test_step_gradient_parity as parity
from tests.dist.harness import run_ranks
from tests.dist.step_parity import Prepared, check

pytestmark = pytest.mark.gpu
GPUS = min(8, torch.cuda.device_count())

images, experts = parity.images, experts_lanes.experts  # the fixtures of the gloo tests


def test_partition_content() -> None:
    run_ranks(GPUS, partition.sharding_rank, backend="nccl")


ROW_CASES = [case for case in bridge.CASES if case[0] + case[2] in (GPUS, GPUS - 1)]


@pytest.mark.parametrize("case", ROW_CASES, ids=str)
def test_rows_arrive_and_gradients_return_once(case: tuple) -> None:
    run_ranks(case[0] + case[2], bridge.bridge_rank, case, [0, 1, 2], backend="nccl")


def test_step_gradients(images: Prepared, experts: Prepared) -> None:
    """The reference is computed on the CPU, so GPU kernels' own rounding is inside the tolerance too."""
    rows = [(case, images) for case in parity.QUICK] + [(case, experts) for case in experts_lanes.CASES]
    check((row for row in rows if row[0].world <= GPUS), backend="nccl")

"""The distributed tests again, on NCCL: the same functions as on gloo, with as many ranks as there are GPUs (up to 8).

pytest -m gpu
"""

import pytest
import torch

from tests.dist import test_partition_content as partition
from tests.dist.harness import in_turn, run_ranks
from tests.dist.model import test_bridge as bridge
from tests.dist.train import test_decoder_gradient_parity as decoders
from tests.dist.train import test_expert_lanes as experts_lanes
from tests.dist.train import test_step_gradient_parity as parity
from tests.dist.train.step_parity import Case, Prepared, check

pytestmark = pytest.mark.gpu
GPUS = min(8, torch.cuda.device_count())

# The fixtures of the gloo tests.
images, experts, colours = parity.images, experts_lanes.experts, decoders.colours


def test_partition_content() -> None:
    run_ranks(GPUS, partition.sharding_rank, backend="nccl")


def test_rows_arrive_and_gradients_return_once() -> None:
    cases = [case for case in bridge.CASES if case[0] + case[2] == GPUS]
    assert cases, f"no case for {GPUS} GPUs"
    run_ranks(GPUS, in_turn, bridge.bridge_rank, [(case, [0, 1, 2]) for case in cases], backend="nccl")


# Of two or four ranks: starting as many and compiling for them costs as much as several steps.
WITH_IMAGES = [
    Case(sequences=1),
    Case(colocated=True, pp=2, sequences=1),
    Case(vision=2, tp=2, sp=True),
    Case(vision=2, tp=2),
    Case(vision=2, cp=2, packing=True),
    Case(vision=2, pp=2, sequences=1),
    Case(pp=3, part=True, sequences=1),
    Case(vision_pp=2, pp=2, sequences=1),
    Case(colocated=True, tp=2, pp=2, sp=True, packing=True, sequences=1),
    Case(vision_tp=2, dp=3, sequences=1, ranks=((0, 1), (1, 2, 3))),
    Case(colocated=True, vision_tp=2, dp=2, cp=2, sequences=1, frozen=("vision tower",)),
]
WITH_EXPERTS = [
    Case(vision=2, dp=2, ep=2, sequences=1),
    Case(colocated=True, dp=2, tp=2, ep=2, sp=True, sequences=1, packing=True),
]
WITH_DECODERS = [
    Case(pixels=1, pixels_tp=2, pp=2, sequences=2, colocated=True),
    Case(pixels=1, pp=2, sequences=1, ranks=((1,), (0, 1), (0,))),
    Case(pixels=1, tp=2, sp=True, packing=True),
    Case(pixels=1, pp=2, sequences=1),
    Case(vision=2, pixels=1, pixels_tp=2, tp=2, pp=2, sp=True, sequences=1, ranks=((0, 3), (0, 1, 2, 3), (1, 2))),
]


@pytest.mark.parametrize("world", [2, 4])
def test_step_gradients(world: int, images: Prepared, experts: Prepared, colours: Prepared) -> None:
    """The reference is computed on the CPU, so GPU kernels' own rounding is inside the tolerance too."""
    if world > GPUS:
        pytest.skip(f"{world} GPUs are needed")
    tables = ((WITH_IMAGES, images), (WITH_EXPERTS, experts), (WITH_DECODERS, colours))
    check(((case, data) for cases, data in tables for case in cases if case.world == world), backend="nccl")

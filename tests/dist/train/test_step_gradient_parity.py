"""One global step has the loss and the gradients that transformers computes in one process, whatever the layout.

`step_parity` has the tolerance. Every file of ranks is forked once per number of ranks and runs all its rows.
"""

import pytest

from tests.dist.harness import run_ranks
from tests.dist.train.step_parity import (
    Case,
    Prepared,
    check,
    prepare,
    step_with_wrong_row,
    worst_gradient,
    write_run,
)

# A pairwise cover of the sizes in the table below: every two values of two columns meet in some row.
QUICK = [
    Case(colocated=True),
    Case(vision=3, dp=2, sequences=1),
    Case(vision=2, dp=3),
    Case(vision=2, tp=2, sp=True),
    Case(vision=1, tp=2, dp=2, sequences=3),
    Case(vision=2, cp=2, packing=True),
    Case(vision=2, dp=1, tp=2, cp=2, sp=True, packing=True),
    Case(vision=1, vision_tp=2, dp=2, cp=2, sequences=1),
    Case(colocated=True, dp=2, tp=2, sp=True, packing=True, sequences=1),
    Case(vision=1, pp=2, sequences=1),
    Case(vision=1, pp=2, tp=2, sp=True, packing=True),
    Case(vision=2, pp=3, dp=2, part=True, sequences=1),
    Case(colocated=True, pp=4, sequences=7, part=True),
    Case(vision_pp=2, sequences=1),
    Case(vision_pp=2, pp=2, packing=True),
    Case(vision_pp=2, pp=2, sequences=7),
    Case(vision_pp=2, pp=2, sequences=1, frozen=("vision",)),
    Case(vision_pp=2, dp=2, sequences=1, frozen=("vision tower",)),
    Case(vision_tp=2, vision_pp=2, tp=2, sp=True),
    Case(colocated=True, vision_pp=2, dp=2, pp=2, sequences=1),
    Case(vision_tp=2, dp=3, ranks=((0, 1), (1, 2, 3)), sequences=1),
    Case(vision=2, tp=2, dp=2, ranks=((1, 2), (0, 1, 2, 3)), sequences=1),
    Case(colocated=True, vision_tp=2, tp=2, cp=2, sequences=1),
]
COMPLETE = [
    Case(vision, vision_tp, dp=dp, tp=tp, cp=cp, sp=sp, sequences=sequences, packing=packing)
    for vision, vision_tp in ((1, 1), (2, 1), (3, 1), (1, 2))
    for dp in (1, 2, 3)
    for tp, sp in ((1, False), (2, False), (2, True))
    for cp in (1, 2)
    for sequences, packing in ((1, False), (3, False), (2, True))
    if vision * vision_tp + dp * tp * cp <= 8 and not (packing and sequences == 1)
]
STAGES = [
    Case(vision, dp=dp, tp=tp, cp=cp, sp=sp, pp=pp, part=pp > 2, sequences=sequences, packing=packing)
    for vision in (1, 2)
    for pp, dp, tp, cp, sp in (
        *((2, 1, 1, 1, False), (2, 2, 1, 1, False), (2, 3, 1, 1, False), (2, 1, 2, 1, False), (2, 1, 2, 1, True)),
        *((2, 1, 1, 2, False), (2, 1, 1, 3, False), (3, 1, 1, 1, False), (3, 2, 1, 1, False), (3, 1, 2, 1, True)),
        *((3, 1, 1, 2, False), (4, 1, 1, 1, False), (5, 1, 1, 1, False), (6, 1, 1, 1, False)),
    )
    for sequences, packing in ((1, False), (3, False), (7, False), (1, True))
] + [
    Case(
        1,
        vision_tp,
        dp=dp,
        tp=tp,
        cp=cp,
        sp=sp,
        pp=pp,
        part=pp > 2,
        sequences=sequences,
        packing=packing,
        colocated=True,
    )
    for vision_tp in (1, 2)
    for pp, dp, tp, cp, sp in ((2, 1, 1, 1, False), (2, 2, 2, 1, True), (2, 2, 1, 2, False), (4, 1, 2, 1, True))
    for sequences, packing in ((1, False), (7, False), (1, True))
]
"""Pipelines with more and with fewer microbatches than stages; idle lanes; the cut between shared keys and values."""
ENCODER_STAGES = [
    Case(vision, vision_tp, 2, dp=dp, tp=tp, cp=cp, sp=sp, pp=pp, sequences=sequences, packing=packing)
    for vision, vision_tp in ((1, 1), (2, 1), (1, 2))
    for pp, dp, tp, cp, sp in ((1, 1, 1, 2, False), (1, 3, 1, 1, False), (2, 1, 2, 1, True), (2, 2, 1, 1, False))
    for sequences, packing in ((1, False), (7, False), (1, True))
] + [
    Case(1, vision_tp, 2, dp=dp, cp=cp, pp=pp, sequences=sequences, packing=packing, colocated=True)
    for vision_tp in (1, 2)
    for pp, dp, cp in ((1, 4, 1), (1, 2, 2), (2, 2, 1), (2, 1, 2))
    for sequences, packing in ((1, False), (7, False), (1, True))
]
"""Encoders in stages before language models of all kinds, apart from them and on their ranks."""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepare(tmp_path_factory.mktemp("images"), write_run)


@pytest.mark.parametrize("world", sorted({case.world for case in QUICK}))
def test_quick_cover(world: int, images: Prepared) -> None:
    check((case, images) for case in QUICK if case.world == world)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("world", sorted({case.world for case in COMPLETE + STAGES + ENCODER_STAGES}))
def test_complete_table(world: int, images: Prepared) -> None:
    table = COMPLETE + STAGES + ENCODER_STAGES
    check(((case, images) for case in table if case.world == world), timeout=3500)


@pytest.mark.parametrize("mutation", ["dropped", "counted twice"])
def test_one_wrong_row_gradient_is_caught(mutation: str, images: Prepared) -> None:
    case = Case(vision=2, dp=3, sequences=3)
    factor = 0.0 if mutation == "dropped" else 2.0
    results = run_ranks(case.world, step_with_wrong_row, images.folder, case.overrides, "post_to_module", factor)
    ratio, _ = worst_gradient(results, images.reference)
    assert ratio > 1.0

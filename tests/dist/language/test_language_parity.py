"""The language model has the logits, loss and every gradient of transformers' Gemma 4, however it is cut over ranks."""

from itertools import combinations, product

import pytest

from tests.dist.harness import run_ranks
from tests.dist.language.language_ranks import Case, RankResult, deviations, rank_result
from tests.dist.language.language_reference import VARIANTS, Reference, huggingface_results

EVERYWHERE = [variant for variant in VARIANTS if variant != "threes"]

# Per variant: one case at each tensor-parallel size, sequence parallelism and checkpointing taking turns.
QUICK = [
    Case(variant, tp, sequence_parallel=tp > 1 and turn % 2 == 1, checkpointing=("none", "selective", "full")[turn % 3])
    for number, variant in enumerate(EVERYWHERE)
    for turn, tp in enumerate((1, 2, 4, 8), start=number)
]
# Three key/value heads: split over three ranks, each on two of six.
QUICK += [Case("threes", 1), Case("threes", 3, sequence_parallel=True), Case("threes", 6, checkpointing="full")]
QUICK += [
    Case("e4b", cp=2),
    Case("e2b", 2, cp=2, sequence_parallel=True, checkpointing="full"),
    Case("31b", 2, cp=2, checkpointing="selective"),
    Case("12b", cp=4),
    Case("26b", 2, cp=2, ep=2, checkpointing="full"),
    Case("26b", 2, cp=2, ep=2, sequence_parallel=True),
    Case("26b", cp=4, ep=4),
]
COMPLETE = [
    Case(variant, tp, sequence_parallel=sequence_parallel, checkpointing=checkpointing)
    for variant, tp, sequence_parallel, checkpointing in product(
        EVERYWHERE, (1, 2, 4, 8), (False, True), ("none", "selective", "full")
    )
    if tp > 1 or not sequence_parallel
]


@pytest.fixture(scope="module")
def references() -> dict[str, Reference]:
    return run_ranks(1, all_references)[0]


def all_references(rank: int) -> dict[str, Reference]:
    return {variant: huggingface_results(variant) for variant in VARIANTS}


def all_results(rank: int, cases: list[Case]) -> list[RankResult]:
    return [rank_result(rank, case) for case in cases]


def check(cases: list[Case], world: int, references: dict[str, Reference]) -> None:
    """Run the cases of one world size on ranks forked once, and name all that deviates."""
    cases = [case for case in cases if case.tp * case.cp == world]
    ranks = run_ranks(world, all_results, cases, timeout=280)
    found: list[str] = []
    for number, case in enumerate(cases):
        found += deviations(case, [results[number] for results in ranks], references[case.variant])
    assert not found, "\n".join(found)


@pytest.mark.parametrize("world", sorted({case.tp * case.cp for case in QUICK}))
def test_matches_transformers(world: int, references: dict[str, Reference]) -> None:
    check(QUICK, world, references)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_complete_table_matches_transformers(world: int, references: dict[str, Reference]) -> None:
    check(COMPLETE, world, references)


def test_quick_cases_show_every_pair_of_the_complete_table() -> None:
    def pairs(cases: list[Case]) -> set[tuple]:
        return {pair for case in cases for pair in combinations(vars(case).items(), 2)}

    assert pairs(COMPLETE) <= pairs(QUICK)

"""An error on one rank is raised on every rank, with its kind and text; a success returns the result of each rank."""

import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from mimo_gemma4.distributed.collective_errors import all_ranks_finish_or_raise, all_ranks_or_raise
from mimo_gemma4.errors import DataError, MimoError
from tests.dist.harness import run_ranks


def outcome(rank: int, ranks: list[int], error: type[Exception]) -> tuple[type, str] | int:
    """What this rank gets of an action that fails on `ranks`: its result, or type and text of its error."""

    def action() -> int:
        if rank in ranks:
            raise error(f"no file on rank {rank}")
        return rank

    try:
        return all_ranks_or_raise(dist.group.WORLD, action)
    except Exception as raised:
        return type(raised), str(raised)


@pytest.mark.parametrize(
    ("ranks", "error", "expected"),
    [
        ([], DataError, [0, 1, 2]),
        ([1], DataError, [(DataError, "no file on rank 1")] * 3),
        ([1, 2], DataError, [(DataError, f"no file on rank {rank}") for rank in (1, 1, 2)]),
        (
            [2],
            OSError,
            [(MimoError, "another rank failed: OSError: no file on rank 2")] * 2 + [(OSError, "no file on rank 2")],
        ),
    ],
)
def test_failures(ranks: list[int], error: type[Exception], expected: list) -> None:
    assert run_ranks(3, outcome, ranks, error) == expected


def test_without_a_group_the_error_is_the_ranks_own() -> None:
    with pytest.raises(KeyError):
        all_ranks_or_raise(None, lambda: {}["absent"])


def slow_outcome(rank: int, fails: int | None) -> tuple[type, str] | int:
    """What this rank gets of work that lasts 2.5 s on rank 0, in a group whose collectives may last 1 s."""
    impatient = dist.new_group(backend="gloo", timeout=timedelta(seconds=1))

    def action() -> int:
        if rank == fails:
            raise DataError(f"no file on rank {rank}")
        time.sleep(2.5 * (rank == 0))
        return rank

    try:
        return all_ranks_finish_or_raise(impatient, action, poll=0.1)
    except Exception as raised:
        return type(raised), str(raised)


def test_ranks_wait_for_long_work_beyond_the_time_out_of_a_collective() -> None:
    assert run_ranks(2, slow_outcome, None) == [0, 1]


def test_long_work_that_fails_ends_the_wait_on_every_rank() -> None:
    assert run_ranks(2, slow_outcome, 1) == [(DataError, "no file on rank 1")] * 2


def test_long_work_without_a_group_raises_its_own_error() -> None:
    with pytest.raises(KeyError):
        all_ranks_finish_or_raise(None, lambda: {}["absent"])

"""Run a function on real ranks: forked from the test process (torch is imported once), joined by a file store.

`run_ranks(world_size, function, *args)` calls `function(rank, *args)` on every rank with torch.distributed initialised
(gloo on the CPU, NCCL with one GPU a rank where `backend="nccl"`), and returns the results in rank order. A rank that
fails or hangs fails the test with that rank's traceback.
"""

import faulthandler
import multiprocessing
import os
import pickle  # noqa: S403 - only between a test and its own ranks
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def run_ranks(
    world_size: int, function: Callable[..., Any], *args: Any, backend: str = "gloo", timeout: float = 120.0
) -> list[Any]:
    """What `function(rank, *args)` returns on each rank. Raises `AssertionError` with tracebacks of failing ranks."""
    # CUDA cannot be used in a fork of a process that has initialised it; NCCL ranks are spawned.
    context = multiprocessing.get_context("fork" if backend == "gloo" else "spawn")
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(target=_run_rank, args=(rank, world_size, backend, folder, timeout, function, args))
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        _join(ranks, timeout)
        failures, results = [], []
        for rank in range(world_size):
            path = Path(folder) / f"result.{rank}"
            if not path.exists():
                failures.append(f"rank {rank} ended with exit code {ranks[rank].exitcode} and no result")
                continue
            ok, value = pickle.loads(path.read_bytes())  # noqa: S301
            if ok:
                results.append(value)
            else:
                failures.append(f"rank {rank}:\n{value}")
        if failures:
            raise AssertionError("\n\n".join(failures))
        return results


def in_turn(rank: int, function: Callable[..., Any], calls: Sequence[tuple]) -> list[Any]:
    """Results of `function(rank, *arguments)` for each of `calls`: ranks need not be started for every one."""
    results = []
    for number, arguments in enumerate(calls, 1):
        if rank == 0:  # a test that hangs shows where
            print(f"{number} of {len(calls)}: {function.__name__}{arguments}", flush=True)
        try:
            results.append(function(rank, *arguments))
        except BaseException as error:
            error.add_note(f"in the call with {arguments}")
            raise
    return results


def rank_device() -> torch.device:
    """Where this rank's tensors belong: its GPU under NCCL, the CPU under gloo."""
    return torch.device("cuda", dist.get_rank()) if dist.get_backend() == "nccl" else torch.device("cpu")


def _join(ranks: list[Any], timeout: float) -> None:
    deadline = time.monotonic() + timeout + 20
    while any(process.is_alive() for process in ranks):
        failed = any(process.exitcode not in (0, None) for process in ranks)
        if failed:  # give the others a moment to report, then stop them: they wait for a rank that is gone
            deadline = min(deadline, time.monotonic() + 5)
        if time.monotonic() > deadline:
            for process in ranks:
                if process.is_alive():
                    process.kill()
        time.sleep(0.01)


def _run_rank(
    rank: int, world_size: int, backend: str, folder: str, timeout: float, function: Callable[..., Any], args: tuple
) -> None:
    faulthandler.enable()
    faulthandler.dump_traceback_later(timeout + 10, exit=True)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size)
    )
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the platform of a gloo rank is the CPU, also on a host with GPUs
    try:
        store = dist.FileStore(f"{folder}/store", world_size)
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout)
        )
        result = (True, function(rank, *args))
    except BaseException:
        result = (False, traceback.format_exc())
    partial = Path(folder) / f"partial.{rank}"
    partial.write_bytes(pickle.dumps(result))
    partial.rename(Path(folder) / f"result.{rank}")
    if result[0] and dist.is_initialized():  # a whole training run ends by leaving the process group
        dist.barrier()  # no rank leaves while another still sends to it
        dist.destroy_process_group()
    os._exit(0 if result[0] else 1)

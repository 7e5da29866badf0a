"""An error on one rank becomes an error on every rank, not a hang. For what ranks do together outside the step."""

import threading
from collections.abc import Callable

import torch
import torch.distributed as dist

from mimo_gemma4.errors import MimoError

_DONE, _RUNNING, _FAILED = 0, 1, 2
"""States of a rank's long work; the highest of all ranks counts."""


def highest(value: int, group: dist.ProcessGroup | None) -> int:
    """The largest `value` on all ranks of a host-side (gloo) group; None: this rank alone. Collective."""
    if group is None or group.size() == 1:
        return value
    agreed = torch.tensor(value)
    dist.all_reduce(agreed, op=dist.ReduceOp.MAX, group=group)
    return int(agreed)


def all_ranks_or_raise[T](group: dist.ProcessGroup | None, action: Callable[[], T]) -> T:
    """The result of `action` on this rank, once it has succeeded on every rank of `group`. Collective.

    Where it fails on some ranks, every rank raises: each of these its own error, the others a `MimoError` with the type
    and text of the first of them.

    Args:
        group: host-side (gloo) group; None: this rank alone.
        action: what each rank does; must not communicate inside `group`.
    """
    results: list[T] = []
    error = None
    try:
        results.append(action())
    except Exception as raised:
        error = raised
    if highest(int(error is not None), group) and group is not None:
        reports: list[tuple[type, str] | None] = [None] * group.size()
        report = None if error is None else (type(error), str(error))
        dist.all_gather_object(reports, report, group=group)
        other = next((found for found in reports if found is not None), None)
        if error is None and other is not None:
            kind, text = other
            error = (
                kind(text)
                if issubclass(kind, MimoError)
                else MimoError(f"another rank failed: {kind.__name__}: {text}")
            )
    if error is not None:
        raise error
    return results[0]


def all_ranks_finish_or_raise[T](group: dist.ProcessGroup | None, action: Callable[[], T], poll: float = 1.0) -> T:
    """Like `all_ranks_or_raise`, for an `action` that may take longer on one rank than the others may wait. Collective.

    The action runs in a thread of its own, while every rank asks the others every `poll` seconds whether they are done.
    So no collective waits for the work, and a rank that dies is noticed within the group's time-out. Once one rank
    fails, all raise; actions that still run are left behind.

    Args:
        group: host-side (gloo) group; None: this rank alone.
        action: what each rank does; must not communicate inside `group`.
        poll: seconds between two questions.
    """
    if group is None or group.size() == 1:
        return action()
    results, errors = list[T](), list[Exception]()
    finished, failed = threading.Event(), threading.Event()

    def work() -> None:
        try:
            results.append(action())
        except Exception as error:
            errors.append(error)
            failed.set()
        finally:
            finished.set()

    threading.Thread(target=work, name="long work", daemon=True).start()
    state = _RUNNING
    while state == _RUNNING:
        finished.wait(poll)
        state = highest(_FAILED if failed.is_set() else _DONE if finished.is_set() else _RUNNING, group)

    def raise_error() -> None:
        for error in errors:
            raise error

    all_ranks_or_raise(group, raise_error)
    return results[0]

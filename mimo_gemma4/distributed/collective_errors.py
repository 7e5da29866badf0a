"""An error on one rank becomes an error on every rank, not a hang. For what ranks do together outside the step."""

from collections.abc import Callable

import torch
import torch.distributed as dist

from mimo_gemma4.errors import MimoError


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

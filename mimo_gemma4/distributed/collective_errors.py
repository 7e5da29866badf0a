"""One rank's mistake is every rank's error, never a hang: what ranks do together outside the step goes through here."""

from collections.abc import Callable

import torch
import torch.distributed as dist

from mimo_gemma4.errors import MimoError


def highest(value: int, group: dist.ProcessGroup | None) -> int:
    """The largest `value` of all ranks of a host group; None is this rank alone. Collective."""
    if group is None or group.size() == 1:
        return value
    agreed = torch.tensor(value)
    dist.all_reduce(agreed, op=dist.ReduceOp.MAX, group=group)
    return int(agreed)


def all_ranks_or_raise[T](group: dist.ProcessGroup | None, action: Callable[[], T]) -> T:
    """The result of `action` on this rank, once it has succeeded on every rank of `group`.

    Where it raises on some rank, every rank raises: those where it failed their own error, the others a `MimoError` of
    the same type and text as the first rank that failed. Collective.

    Args:
        group: host-side (gloo) group; None runs the action alone.
        action: what each rank does; must not communicate inside `group`.
    """
    result, error = None, None
    try:
        result = action()
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
    return result  # type: ignore[return-value]

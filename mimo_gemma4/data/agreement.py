"""Agreement of ranks on what went wrong, so that all of them go on or all of them raise, and none waits for another."""

from typing import Literal

import torch
from torch import distributed as dist

from mimo_gemma4.errors import DataError

BadSamplePolicy = Literal["skip", "fail"]
"""What to do with a sample that cannot be used: leave it out and count it, or stop."""


def allowed_bad(samples: int, max_bad_fraction: float) -> float:
    """How many of `samples` may be bad. A single one never stops a run, unless the fraction is 0."""
    return max(1.0, max_bad_fraction * samples) if max_bad_fraction > 0 else 0.0


def require_equal(value: int, what: str, group: dist.ProcessGroup) -> None:
    """Raise `DataError` on every rank of a host group unless all ranks have the same `value` (below 2**62)."""
    extremes = torch.tensor([value, -value])
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
    largest, smallest = int(extremes[0]), -int(extremes[1])
    if largest != smallest:
        raise DataError(
            f"ranks disagree on {what} (this rank: {value}, range {smallest} … {largest}); every host must see the "
            f"same shards, tokenizer and model configuration"
        )

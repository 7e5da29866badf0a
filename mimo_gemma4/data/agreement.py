"""Checks that ranks agree on the data, so that all continue or all raise."""

from typing import Literal

import torch
from torch import distributed as dist

from mimo_gemma4.errors import DataError

BadSamplePolicy = Literal["skip", "fail"]
"""What to do with a sample that cannot be used: skip and count it, or end the run."""


def allowed_bad(samples: int, max_bad_fraction: float) -> float:
    """How many of `samples` may be bad: at least one, unless the fraction is 0."""
    return max(1.0, max_bad_fraction * samples) if max_bad_fraction > 0 else 0.0


def require_equal(value: int, what: str, group: dist.ProcessGroup) -> None:
    """Raise `DataError` on every rank of a host group unless all have the same `value` (below 2**62). Collective."""
    extremes = torch.tensor([value, -value])
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
    largest, smallest = int(extremes[0]), -int(extremes[1])
    if largest != smallest:
        raise DataError(
            f"ranks disagree on {what} (this rank: {value}, range {smallest} … {largest}); every host must see the "
            f"same shards, tokenizer and model configuration"
        )

"""Numeric ranges of options: stated with the field, checked when it is read, shown in the reference."""

import math
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Range:
    """Finite numbers above a lower bound and, if there is one, below an upper bound."""

    above: float | None = None
    """Lower bound, itself excluded. One of `above` and `at_least` is given."""
    at_least: float | None = None
    """Lower bound, itself included."""
    below: float | None = None
    """Upper bound, itself excluded. Neither `below` nor `at_most`: no upper bound."""
    at_most: float | None = None
    """Upper bound, itself included."""

    def __contains__(self, value: float) -> bool:
        """Whether `value` is finite and within the bounds."""
        return (
            math.isfinite(value)
            and (self.above is None or value > self.above)
            and (self.at_least is None or value >= self.at_least)
            and (self.below is None or value < self.below)
            and (self.at_most is None or value <= self.at_most)
        )

    def __str__(self) -> str:
        """The range behind a type or variable: `> 0`, `>= 0` or `in [0, 1)`."""
        if self.below is None and self.at_most is None:
            return f">= {self.at_least}" if self.above is None else f"> {self.above}"
        lower = f"[{self.at_least}" if self.above is None else f"({self.above}"
        upper = f"{self.at_most}]" if self.below is None else f"{self.below})"
        return f"in {lower}, {upper}"

    def complaint(self, value: float) -> str:
        """Why `value` is refused, to follow the name of its key."""
        if self.below is not None or self.at_most is not None:
            return f"must be {self}, not {value}"
        if self.at_least == 0:
            return f"must not be negative or infinite, but is {value}"
        if value == math.inf:
            return f"must be finite, not {value}"
        bound = f"at least {self.at_least}" if self.above is None else f"greater than {self.above}"
        return f"must be {bound}, not {value}"


def option[T](
    default: T,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
) -> T:
    """A dataclass field whose numbers are within these bounds; values of other types, such as None, have no range."""
    bounds = Range(above, at_least, below, at_most)
    return field(default=default, metadata={"range": bounds})

"""A figure taken several times, as it is printed: mean and standard deviation."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def deviation(values: Sequence[float]) -> float:
    """The standard deviation; 0 of a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def spread(values: Sequence[float], digits: int = 0, sign: str = "+-") -> str:
    """`mean +- standard deviation`, with so many digits behind the point."""
    return f"{statistics.mean(values):.{digits}f} {sign} {deviation(values):.{digits}f}"

"""Intervals for rates."""

import math

# Two-sided 95 %.
_Z = 1.959963984540054


def wilson(rate: float, count: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a rate seen in `count` trials (Wilson 1927)."""
    if count < 1 or not 0 <= rate <= 1:
        raise ValueError(f"rate {rate} of {count} trials, expected a rate in [0, 1] of at least one trial")
    square = _Z * _Z
    middle = (rate + square / (2 * count)) / (1 + square / count)
    half = _Z / (1 + square / count) * math.sqrt(rate * (1 - rate) / count + square / (4 * count * count))
    return max(0.0, middle - half), min(1.0, middle + half)

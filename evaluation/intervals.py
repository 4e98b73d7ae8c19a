"""Confidence intervals for rates and means."""

import math
from collections.abc import Sequence

import numpy as np

from secondcast.storage_schemas.schema.fields import Array

# Two-sided 95 %.
_Z = 1.959963984540054
_PERCENTILES = (2.5, 97.5)
_RESAMPLES = 2000
_CHUNK = 50


def wilson(rate: float, count: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a rate observed in `count` trials (Wilson 1927)."""
    if count < 1 or not 0 <= rate <= 1:
        raise ValueError(f"rate {rate} of {count} trials, expected a rate in [0, 1] of at least one trial")
    square = _Z * _Z
    middle = (rate + square / (2 * count)) / (1 + square / count)
    half = _Z / (1 + square / count) * math.sqrt(rate * (1 - rate) / count + square / (4 * count * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def bootstrap(values: Sequence[float], *, seed: int = 0) -> tuple[float, float] | None:
    """The 95 % percentile bootstrap interval of a mean, 2,000 resamples (Efron 1979); None for fewer than two."""
    if len(values) < 2:
        return None
    low, high = np.percentile(_resampled_means(values, seed), _PERCENTILES)
    return float(low), float(high)


def bootstrap_average(groups: Sequence[Sequence[float]]) -> tuple[float, float] | None:
    """The 95 % percentile bootstrap interval of the mean of the groups' means, each group resampled on its own.

    None if all groups have fewer than two values.
    """
    if max(map(len, groups)) < 2:
        return None
    means = np.mean([_resampled_means(values, seed) for seed, values in enumerate(groups)], axis=0)
    low, high = np.percentile(means, _PERCENTILES)
    return float(low), float(high)


def _resampled_means(values: Sequence[float], seed: int) -> Array:
    array = np.asarray(values, dtype=np.float64)
    generator = np.random.Generator(np.random.Philox(seed))
    parts = [
        array[generator.integers(0, len(array), size=(_CHUNK, len(array)))].mean(axis=1)
        for _ in range(_RESAMPLES // _CHUNK)
    ]
    return np.concatenate(parts)


def clustered(values_RN: Sequence[Sequence[float]]) -> tuple[float, float]:
    """The 95 % interval of the mean of R runs on the same N captions, each value in [0, 1].

    Runs share the captions, and their values are correlated: a caption's values are averaged over the runs, and
    captions are resampled. The interval is for these runs on other captions, not for other runs. If all captions have
    the same mean, resampling is uninformative, and Wilson's interval of N trials is used.
    """
    mean_N = np.mean(np.asarray(values_RN, dtype=np.float64), axis=0)
    found = None if np.ptp(mean_N) == 0 else bootstrap(mean_N.tolist())
    return found or wilson(min(1.0, float(mean_N.mean())), len(mean_N))

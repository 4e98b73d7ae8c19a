"""Predicts each step of a trajectory as a weighted sum of the last three, identically on every machine.

The residual is small where the trajectory is smooth. The weights are fitted per step when encoding and stored;
decoding repeats single float32 products and sums, which IEEE 754 defines bit for bit.
"""

import numpy as np

HISTORY = 3
# Fitting on every seventh element costs a seventh and changes the weights by less than their rounding.
_FIT_STRIDE = 7
_WEIGHT_UNIT = 1 / 512


def fit_weights(values_KN: list[np.ndarray]) -> np.ndarray:
    """Weights of the last steps for each step, [K, HISTORY] float32, by least squares over finite float32 steps."""
    steps = len(values_KN)
    weights = np.zeros((steps, HISTORY), dtype=np.float32)
    samples_KM = np.stack([values[::_FIT_STRIDE].astype(np.float64) for values in values_KN])
    # Sums by numpy, not by BLAS: the bytes of a shard do not depend on the number of threads.
    products = [(samples_KM[lag:] * samples_KM[: steps - lag]).sum(axis=1) for lag in range(min(HISTORY + 1, steps))]
    # The first steps have fewer predecessors.
    for count in range(1, min(HISTORY, steps - 1) + 1):
        first, end = count, steps if count == HISTORY else count + 1
        weights[first:end, :count] = _least_squares(products, np.arange(first, end), count)
    return weights


def _least_squares(products: list[np.ndarray], k: np.ndarray, count: int) -> np.ndarray:
    """Weights of `count` steps before each step in `k`. products[lag][i]: that of the steps i and i + lag."""
    normal = np.empty((len(k), count, count))
    for i, j in np.ndindex(count, count):
        normal[:, i, j] = products[abs(i - j)][k - 1 - max(i, j)]
    towards = np.stack([products[1 + i][k - 1 - i] for i in range(count)], axis=1)
    ridge = 1e-9 * np.maximum(np.trace(normal, axis1=1, axis2=2), 1e-30)
    with np.errstate(all="ignore"):
        solved = np.linalg.solve(normal + ridge[:, None, None] * np.eye(count), towards[:, :, None])[:, :, 0]
        useless = ~np.isfinite(solved).all(axis=1) | (np.abs(solved).max(axis=1) > 8)
    solved[useless] = np.eye(count)[0]
    return np.round(solved / _WEIGHT_UNIT) * _WEIGHT_UNIT


def predict(history: list[np.ndarray], weights: np.ndarray, out: np.ndarray, scratch: np.ndarray) -> np.ndarray:
    """`out`, the weighted sum of `history` (newest first, float32), term by term in this order."""
    if not history:
        out.fill(0)
        return out
    np.multiply(history[0], weights[0], out=out)
    for values, weight in zip(history[1:], weights[1:], strict=False):
        np.multiply(values, weight, out=scratch)
        np.add(out, scratch, out=out)
    return out


def weights_part(weights: np.ndarray) -> np.ndarray:
    """Weights as bytes, uint8."""
    return weights.astype("<f4").reshape(-1).view(np.uint8)


def weights_bytes(steps: int) -> int:
    """Size of the weights of `steps` steps, in bytes."""
    return 4 * HISTORY * steps


def weights_of(part: np.ndarray) -> np.ndarray:
    """The inverse of `weights_part`, [K, HISTORY] float32."""
    return part.view("<f4").reshape(-1, HISTORY)

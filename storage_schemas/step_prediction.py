"""Predicting each step of a trajectory from the ones before: a weighted sum of the last three, the same everywhere.

What a step differs from its prediction is small where the teacher moves smoothly. The weights are fitted per step
when encoding and stored; decoding repeats single float32 products and sums, which IEEE 754 fixes bit for bit.
"""

import numpy as np

HISTORY = 3
# Fitting on every seventh element costs a seventh and moves the weights by less than they are rounded to.
_FIT_STRIDE = 7
_WEIGHT_UNIT = 1 / 512


def fit_weights(values_KN: list[np.ndarray]) -> np.ndarray:
    """Weights of the last steps for each step, [K, HISTORY] float32, by least squares over finite float32 steps."""
    weights = np.zeros((len(values_KN), HISTORY), dtype=np.float32)
    samples = [values[::_FIT_STRIDE].astype(np.float64) for values in values_KN]
    for k in range(1, len(samples)):
        count = min(k, HISTORY)
        weights[k, :count] = _least_squares(samples[k], [samples[k - 1 - j] for j in range(count)])
    return weights


def _least_squares(target: np.ndarray, history: list[np.ndarray]) -> np.ndarray:
    count = len(history)
    # Sums by numpy, not by BLAS: the bytes of a shard do not depend on the number of threads.
    products = np.array([[(a * b).sum() for b in history] for a in history])
    towards = np.array([(a * target).sum() for a in history])
    ridge = 1e-9 * max(float(np.trace(products)), 1e-30)
    with np.errstate(all="ignore"):
        solved = np.linalg.solve(products + ridge * np.eye(count), towards)
    if not np.isfinite(solved).all() or np.abs(solved).max() > 8:
        solved = np.eye(count)[0]
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
    """Size of the weights of so many steps, in bytes."""
    return 4 * HISTORY * steps


def weights_of(part: np.ndarray) -> np.ndarray:
    """The inverse of `weights_part`, [K, HISTORY] float32."""
    return part.view("<f4").reshape(-1, HISTORY)

"""Velocities in 8 bits: one scale per (step, token) row over its channels, then distances from a prediction.

The rounding to 8 bits is lossy (`rounded` returns its result); the 8-bit numbers themselves are stored exactly.
Frames: weights [K, HISTORY] float32, the byte planes of the scales, the distances.
"""

from typing import Any, ClassVar

import ml_dtypes
import numpy as np
from numcodecs.abc import Codec
from numcodecs.registry import register_codec

from secondcast.storage_schemas.codecs.byte_planes import (
    BITS,
    Buffer,
    as_bits,
    as_bytes,
    checked_bits,
    checked_shape,
    compress,
    copied_out,
    decompress,
    from_planes,
    planes_of,
)
from secondcast.storage_schemas.codecs.step_prediction import (
    HISTORY,
    fit_weights,
    predict,
    weights_bytes,
    weights_of,
    weights_part,
)

_LARGEST = 127
_DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}


class StepInt8(Codec):
    """Eight bits per element of a finite "bfloat16" or "float32" array of `shape` [K, S, C], bfloat16 scales [K, S]."""

    codec_id: ClassVar[str] = "secondcast.step_int8"

    def __init__(self, *, shape: tuple[int, ...], dtype: str, level: int = 1) -> None:
        self.shape, self.dtype, self.level = checked_shape(shape), dtype, level
        self.bits = checked_bits(dtype, tuple(_DTYPES))
        if len(self.shape) != 3 or not self.shape[0]:
            raise ValueError(f"shape is {self.shape}, expected [K, S, C] with at least one step")

    def encode(self, buf: Buffer) -> bytes:
        """The bytes of an array of this shape and dtype, or of its raw bytes."""
        numbers_KSC, scales_KS = self._quantised(buf)
        scaled = [self._values(n, s).reshape(-1) for n, s in zip(numbers_KSC, scales_KS, strict=True)]
        weights = fit_weights(scaled)
        predictor = _Predictor(self.shape)
        residual_KSC = np.empty(self.shape, dtype=np.uint8)
        for k, numbers in enumerate(numbers_KSC):
            residual_KSC[k] = _zigzag(numbers.view(np.uint8) - predictor.numbers(weights[k], scales_KS[k]))
            predictor.add(numbers, scales_KS[k])
        scales = planes_of(scales_KS.view("<u2").reshape(-1))
        return compress([weights_part(weights), *scales, residual_KSC.reshape(-1)], self.level)

    def decode(self, buf: Buffer, out: Any = None) -> np.ndarray:
        """The dequantised array as unsigned integers (its bits); ValueError for anything but the output of `encode`."""
        steps, tokens, channels = self.shape
        rows = steps * tokens
        part, low, high, residual = decompress(as_bytes(buf), [weights_bytes(steps), rows, rows, rows * channels])
        weights, numbers_KSC = weights_of(part), residual.reshape(self.shape)
        scales_KS = from_planes([low, high], BITS["bfloat16"]).view(ml_dtypes.bfloat16).reshape(steps, tokens)
        values_KSC = np.empty(self.shape, dtype=_DTYPES[self.dtype])
        predictor = _Predictor(self.shape)
        for k in range(steps):
            numbers = (_unzigzag(numbers_KSC[k]) + predictor.numbers(weights[k], scales_KS[k])).view(np.int8)
            values_KSC[k] = predictor.add(numbers, scales_KS[k])
        return copied_out(values_KSC.view(self.bits), out)

    def rounded(self, values: np.ndarray) -> np.ndarray:
        """The values read back for `values` [..., K, S, C], in their dtype."""
        rounded = np.empty_like(values)
        for where in np.ndindex(values.shape[:-3]):
            rounded[where] = self._values(*self._quantised(values[where])).astype(values.dtype)
        return rounded

    def get_config(self) -> dict[str, Any]:
        """The codec as JSON."""
        return {"id": self.codec_id, "shape": list(self.shape), "dtype": self.dtype, "level": self.level}

    def _quantised(self, buf: Buffer) -> tuple[np.ndarray, np.ndarray]:
        """Numbers [K, S, C] int8 and scales [K, S] bfloat16, at least a 127th of each row's largest magnitude."""
        values = as_bits(buf, self.shape, self.bits).view(_DTYPES[self.dtype]).astype(np.float32)
        if not np.isfinite(values).all():
            raise ValueError("an element is not finite: int8 represents finite numbers only")
        largest_KS1 = np.abs(values).max(axis=-1, keepdims=True, initial=0.0)
        scales = (largest_KS1 / np.float32(_LARGEST)).astype(ml_dtypes.bfloat16)
        divisor = np.where(scales == 0, np.float32(1), scales.astype(np.float32))
        numbers = np.clip(np.rint(values / divisor), -_LARGEST, _LARGEST).astype(np.int8)
        return numbers, np.ascontiguousarray(scales[..., 0])

    @staticmethod
    def _values(numbers: np.ndarray, scales: np.ndarray) -> np.ndarray:
        return numbers.astype(np.float32) * scales.astype(np.float32)[..., None]


class _Predictor:
    """Keeps the last steps, dequantised, and predicts the next step in 8 bits with its own scales."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._history: list[np.ndarray] = []
        self._sum, self._scratch = np.empty(shape[1:], dtype=np.float32), np.empty(shape[1:], dtype=np.float32)

    def add(self, numbers_SC: np.ndarray, scales_S: np.ndarray) -> np.ndarray:
        """Append a step to the history; return its dequantised float32."""
        values = StepInt8._values(numbers_SC, scales_S)
        self._history = [values, *self._history[: HISTORY - 1]]
        return values

    def numbers(self, weights: np.ndarray, scales_S: np.ndarray) -> np.ndarray:
        """The prediction in units of these scales, rounded, as uint8 (two's complement)."""
        with np.errstate(all="ignore"):
            predicted = predict(self._history, weights, self._sum, self._scratch)
            predicted /= scales_S.astype(np.float32)[:, None]
            np.rint(predicted, out=predicted)
        # fmin and fmax also turn a NaN (0 / 0) into a bound: what a NaN becomes as int8 differs between processors.
        np.fmin(predicted, np.float32(_LARGEST), out=predicted)
        np.fmax(predicted, np.float32(-_LARGEST), out=predicted)
        return predicted.astype(np.int8).view(np.uint8)


def _zigzag(distance: np.ndarray) -> np.ndarray:
    return (distance << 1) ^ (distance.view(np.int8) >> 7).view(np.uint8)


def _unzigzag(folded: np.ndarray) -> np.ndarray:
    return (folded >> 1) ^ np.negative(folded & np.uint8(1))


register_codec(StepInt8)

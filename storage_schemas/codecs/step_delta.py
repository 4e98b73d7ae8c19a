"""Step delta: stores the distance of each velocity's bits from a prediction by earlier steps. Lossless.

Bits are mapped to integers in the order of the numbers, so that close numbers have close integers; the distance (modulo
2^16 or 2^32) is zigzag-encoded and split into byte planes. Frames: weights [K, HISTORY] float32, then the planes.
"""

from typing import Any, ClassVar

import numpy as np
from numcodecs.abc import Codec
from numcodecs.registry import register_codec

from secondcast.storage_schemas.codecs.byte_planes import (
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


class StepDelta(Codec):
    """Differences along the first axis of a "bfloat16" or "float32" array of `shape` [K, ...]: bit-exact."""

    codec_id: ClassVar[str] = "secondcast.step_delta"

    def __init__(self, *, shape: tuple[int, ...], dtype: str, level: int = 1) -> None:
        self.shape, self.dtype, self.level = checked_shape(shape), dtype, level
        self.bits = checked_bits(dtype, ("bfloat16", "float32"))
        if not self.shape or not self.shape[0]:
            raise ValueError(f"shape is {self.shape}, expected at least one step")

    def encode(self, buf: Buffer) -> bytes:
        """The bytes of an array of this shape and dtype, or of its raw bytes."""
        bits_KN = as_bits(buf, self.shape, self.bits).reshape(self.shape[0], -1)
        predictor = _Predictor(self.bits, bits_KN.shape[1])
        weights = fit_weights([predictor.numbers(bits) for bits in bits_KN])
        residual_KN = np.empty_like(bits_KN)
        for k, bits in enumerate(bits_KN):
            distance = _ordered(bits) - predictor.ordered(weights[k])
            residual_KN[k] = _zigzag(distance)
            predictor.add(bits)
        return compress([weights_part(weights), *planes_of(residual_KN.reshape(-1))], self.level)

    def decode(self, buf: Buffer, out: Any = None) -> np.ndarray:
        """The array as unsigned integers (its bits); ValueError for anything but the output of `encode`."""
        steps, count = self.shape[0], int(np.prod(self.shape, dtype=np.int64))
        sizes = [weights_bytes(steps), *[count] * self.bits.itemsize]
        part, *planes = decompress(as_bytes(buf), sizes)
        weights = weights_of(part)
        bits_KN = from_planes(planes, self.bits).reshape(steps, -1)
        predictor = _Predictor(self.bits, bits_KN.shape[1])
        for k in range(steps):
            ordered = _unzigzag(bits_KN[k])
            ordered += predictor.ordered(weights[k])
            bits_KN[k] = _ordered(ordered)
            predictor.add(bits_KN[k])
        return copied_out(bits_KN.reshape(self.shape), out)

    def get_config(self) -> dict[str, Any]:
        """The codec as JSON."""
        return {"id": self.codec_id, "shape": list(self.shape), "dtype": self.dtype, "level": self.level}


class _Predictor:
    """Keeps the last steps as float32 and predicts the next step as an ordered integer."""

    def __init__(self, bits: np.dtype, count: int) -> None:
        self._bits = bits
        self._history: list[np.ndarray] = []
        self._sum, self._scratch = np.empty(count, dtype=np.float32), np.empty(count, dtype=np.float32)
        self._exponent = bits.type(0x7F80 if bits.itemsize == 2 else 0x7F800000)

    def numbers(self, bits: np.ndarray) -> np.ndarray:
        """Float32 of a step; 0 for infinities and NaNs, whose arithmetic differs between processors."""
        if bits.itemsize == 2:
            values = np.left_shift(bits, 16, dtype=np.uint32).view(np.float32)
        else:
            values = bits.view(np.float32)
        strange = (bits & self._exponent) == self._exponent
        return np.where(strange, np.float32(0), values) if strange.any() else values

    def add(self, bits: np.ndarray) -> None:
        """Append a step to the history. float32 bits are kept by reference."""
        self._history = [self.numbers(bits), *self._history[: HISTORY - 1]]

    def ordered(self, weights: np.ndarray) -> np.ndarray:
        """The ordered integer of the prediction by these weights."""
        with np.errstate(all="ignore"):
            bits = predict(self._history, weights, self._sum, self._scratch).view(np.uint32)
        if self._bits.itemsize == 2:
            bits += np.uint32(0x8000)
            bits >>= np.uint32(16)
            bits = bits.astype(np.uint16)
        bits[(bits & self._exponent) == self._exponent] = 0
        return _ordered(bits)


def _signs(bits: np.ndarray) -> np.ndarray:
    """All ones where the top bit is set, else 0."""
    signed = bits.view(f"i{bits.itemsize}")
    return (signed >> (8 * bits.itemsize - 1)).view(bits.dtype)


def _ordered(bits: np.ndarray) -> np.ndarray:
    """Map bits of a float to an integer (two's complement) in the order of the numbers; its own inverse."""
    mask = _signs(bits)
    mask >>= bits.dtype.type(1)
    mask ^= bits
    return mask


def _zigzag(distance: np.ndarray) -> np.ndarray:
    folded = _signs(distance)
    folded ^= distance << distance.dtype.type(1)
    return folded


def _unzigzag(folded: np.ndarray) -> np.ndarray:
    sign = folded & folded.dtype.type(1)
    np.negative(sign, out=sign)
    sign ^= folded >> folded.dtype.type(1)
    return sign


register_codec(StepDelta)

"""Byte planes: the low bytes of all numbers are separated from the high ones, each plane in its own zstd frame.

Layout: the length of each frame (little-endian uint32), then the frames, lowest byte first. Each frame states
its size and has a checksum. One frame for both planes of bfloat16 noise gave a ratio of 0.77, two give 0.69.
"""

from typing import Any, ClassVar

import numpy as np
from numcodecs.abc import Codec
from numcodecs.registry import register_codec
from numcodecs.zstd import Zstd

BITS: dict[str, np.dtype] = {"bfloat16": np.dtype("<u2"), "float32": np.dtype("<u4"), "int8": np.dtype("<u1")}
Buffer = bytes | bytearray | memoryview | np.ndarray
_FRAME_MAGIC = b"\x28\xb5\x2f\xfd"


class BytePlanes(Codec):
    """Byte planes of an array of `shape`, "bfloat16", "float32" or "int8": bit-exact, one zstd frame per plane."""

    codec_id: ClassVar[str] = "secondcast.byte_planes"

    def __init__(self, *, shape: tuple[int, ...], dtype: str, level: int = 1) -> None:
        self.shape, self.dtype, self.level = checked_shape(shape), dtype, level
        self.bits = checked_bits(dtype, tuple(BITS))

    def encode(self, buf: Buffer) -> bytes:
        """The bytes of an array of this shape and dtype, or of its raw bytes."""
        return compress(planes_of(as_bits(buf, self.shape, self.bits).reshape(-1)), self.level)

    def decode(self, buf: Buffer, out: Any = None) -> np.ndarray:
        """The array as unsigned integers (its bits); ValueError for anything but the output of `encode`."""
        count = int(np.prod(self.shape, dtype=np.int64))
        planes = decompress(as_bytes(buf), [count] * self.bits.itemsize)
        return copied_out(from_planes(planes, self.bits).reshape(self.shape), out)

    def get_config(self) -> dict[str, Any]:
        """The codec as JSON."""
        return {"id": self.codec_id, "shape": list(self.shape), "dtype": self.dtype, "level": self.level}


def planes_of(values: np.ndarray) -> list[np.ndarray]:
    """The byte planes of little-endian unsigned integers [n], lowest first, [n] uint8 each."""
    bytes_NW = values.view(np.uint8).reshape(-1, values.dtype.itemsize)
    return [np.ascontiguousarray(bytes_NW[:, plane]) for plane in range(values.dtype.itemsize)]


def from_planes(planes: list[np.ndarray], dtype: np.dtype) -> np.ndarray:
    """The inverse of `planes_of`, [n] of the unsigned integer type `dtype`."""
    values = np.empty(planes[0].size, dtype=dtype)
    bytes_NW = values.view(np.uint8).reshape(-1, dtype.itemsize)
    for plane, values_N in enumerate(planes):
        bytes_NW[:, plane] = values_N
    return values


def compress(parts: list[np.ndarray], level: int) -> bytes:
    """Compress parts (uint8) to zstd frames with checksums, preceded by their lengths (little-endian uint32)."""
    zstd = Zstd(level=level, checksum=True)
    frames = [zstd.encode(part) for part in parts]
    return b"".join([np.array([len(frame) for frame in frames], dtype="<u4").tobytes(), *frames])


def decompress(data: memoryview, sizes: list[int]) -> list[np.ndarray]:
    """The inverse of `compress` for parts of these sizes; ValueError for other bytes, before memory is allocated."""
    head = 4 * len(sizes)
    if len(data) < head:
        raise ValueError(f"{len(data)} bytes, expected at least {head} for {len(sizes)} lengths")
    ends = head + np.cumsum(np.frombuffer(data[:head], dtype="<u4"), dtype=np.int64)
    if ends[-1] != len(data):
        raise ValueError(f"the last zstd frame ends at {ends[-1]}, the data at {len(data)}")
    begins = [head, *ends[:-1].tolist()]
    frames = [data[begin:end] for begin, end in zip(begins, ends.tolist(), strict=True)]
    return [_decompress_frame(frame, size) for frame, size in zip(frames, sizes, strict=True)]


def _decompress_frame(frame: memoryview, size: int) -> np.ndarray:
    if (stated := _stated_size(frame)) != size:
        raise ValueError(f"a zstd frame states {stated} bytes, expected {size}")
    out = np.empty(size, dtype=np.uint8)
    if not size:
        return out
    try:
        Zstd().decode(frame, out)
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    return out


def _stated_size(frame: memoryview) -> int | None:
    """Content size in the header of a zstd frame (RFC 8878, 3.1.1.1); None where there is none."""
    if len(frame) < 6 or frame[:4] != _FRAME_MAGIC:
        return None
    flags = frame[4]
    single, width = flags >> 5 & 1, (0, 2, 4, 8)[flags >> 6]
    begin = 5 + (not single) + (0, 1, 2, 4)[flags & 3]
    width = width or single
    if not width or len(frame) < begin + width:
        return None
    return int.from_bytes(frame[begin : begin + width], "little") + (256 if width == 2 else 0)


def checked_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape as a tuple of integers of at least 0; ValueError otherwise."""
    if not all(isinstance(size, int) and size >= 0 for size in shape):
        raise ValueError(f"shape is {shape!r}, expected integers of at least 0")
    return tuple(shape)


def checked_bits(dtype: str, known: tuple[str, ...]) -> np.dtype:
    """The unsigned integer type for the bits of a dtype; ValueError for a dtype that the codec does not support."""
    if dtype not in known:
        raise ValueError(f"dtype is {dtype!r}, expected {' or '.join(known)}")
    return BITS[dtype]


def as_bits(buf: Buffer, shape: tuple[int, ...], bits: np.dtype) -> np.ndarray:
    """An array, or its raw bytes, as contiguous unsigned integers of `shape`; ValueError for another size."""
    raw = np.ascontiguousarray(buf).reshape(-1).view(np.uint8) if isinstance(buf, np.ndarray) else buf
    values = np.frombuffer(raw, dtype=bits)
    if values.size != np.prod(shape, dtype=np.int64):
        raise ValueError(f"array has {values.size} elements, expected {list(shape)}")
    return values.reshape(shape)


def as_bytes(buf: Buffer) -> memoryview:
    """View any buffer as bytes."""
    return memoryview(buf).cast("B")  # type: ignore[arg-type]  # numpy arrays have the buffer protocol


def copied_out(values: np.ndarray, out: Any) -> np.ndarray:
    """`values`, or `out` filled with their bytes if the caller of a numcodecs codec passed one."""
    if out is None:
        return values
    np.frombuffer(out, dtype=np.uint8)[:] = values.reshape(-1).view(np.uint8)
    return out


register_codec(BytePlanes)

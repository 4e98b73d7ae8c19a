"""The package's codecs for zarr-python (entry point group `zarr.codecs`): array to bytes, named as in numcodecs.

Shape and dtype are the chunk's, so that zarr.json only has the level. Installing the package is enough for
zarr-python to open such arrays.
"""

import asyncio
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
from zarr.abc.codec import ArrayBytesCodec
from zarr.core.array_spec import ArraySpec
from zarr.core.buffer import Buffer, NDBuffer
from zarr.registry import register_codec

from secondcast.storage_schemas.codecs.by_field import FieldCodec
from secondcast.storage_schemas.codecs.byte_planes import BytePlanes
from secondcast.storage_schemas.codecs.step_delta import StepDelta
from secondcast.storage_schemas.codecs.step_int8 import StepInt8

# Passing a smaller chunk to a thread costs more than encoding it.
_THREAD_BYTES = 512 * 1024


def _raw_bytes(chunk_spec: ArraySpec) -> int:
    return int(np.prod(chunk_spec.shape)) * chunk_spec.dtype.to_native_dtype().itemsize


@dataclass(frozen=True, kw_only=True)
class _RowCodec(ArrayBytesCodec):
    """One row per chunk: a chunk is [1, ...], its row is encoded by the numcodecs codec of this name."""

    is_fixed_size = False
    row_codec: ClassVar[type[FieldCodec]]
    level: int = 1

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """From zarr.json; ValueError for another configuration."""
        configuration = data.get("configuration", {})
        if set(configuration) != {"level"} or not isinstance(configuration["level"], int):
            raise ValueError(f"codec {cls.row_codec.codec_id} has configuration {configuration!r}, expected a level")
        return cls(level=configuration["level"])

    def to_dict(self) -> dict[str, Any]:
        """For zarr.json."""
        return {"name": self.row_codec.codec_id, "configuration": {"level": self.level}}

    def compute_encoded_size(self, input_byte_length: int, chunk_spec: ArraySpec) -> int:
        """Not known before encoding."""
        raise NotImplementedError

    async def _encode_single(self, chunk_data: NDBuffer, chunk_spec: ArraySpec) -> Buffer | None:
        array = np.ascontiguousarray(chunk_data.as_numpy_array())
        encode = self._of(chunk_spec).encode
        encoded = encode(array) if array.nbytes < _THREAD_BYTES else await asyncio.to_thread(encode, array)
        return chunk_spec.prototype.buffer.from_bytes(encoded)

    async def _decode_single(self, chunk_data: Buffer, chunk_spec: ArraySpec) -> NDBuffer:
        decode, array_bytes = self._of(chunk_spec).decode, _raw_bytes(chunk_spec)
        data = chunk_data.as_numpy_array()
        bits = decode(data) if array_bytes < _THREAD_BYTES else await asyncio.to_thread(decode, data)
        array = bits.view(chunk_spec.dtype.to_native_dtype()).reshape(chunk_spec.shape)
        return chunk_spec.prototype.nd_buffer.from_numpy_array(array)

    def _of(self, chunk_spec: ArraySpec) -> FieldCodec:
        rows, *row_shape = chunk_spec.shape
        if rows != 1:
            raise ValueError(f"chunk is {list(chunk_spec.shape)}, codec {self.row_codec.codec_id} takes one row")
        dtype = chunk_spec.dtype.to_native_dtype().name
        return self.row_codec(shape=tuple(row_shape), dtype=dtype, level=self.level)


class ZarrBytePlanes(_RowCodec):
    """`BytePlanes` in zarr.json."""

    row_codec = BytePlanes


class ZarrStepDelta(_RowCodec):
    """`StepDelta` in zarr.json."""

    row_codec = StepDelta


class ZarrStepInt8(_RowCodec):
    """`StepInt8` in zarr.json."""

    row_codec = StepInt8


_BY_ROW_CODEC: dict[type[FieldCodec], type[_RowCodec]] = {
    codec.row_codec: codec for codec in (ZarrBytePlanes, ZarrStepDelta, ZarrStepInt8)
}
NAMES = tuple(codec.row_codec.codec_id for codec in _BY_ROW_CODEC.values())


def zarr_codec(codec: FieldCodec) -> ArrayBytesCodec:
    """The zarr-python codec that keeps each row as `codec` does."""
    return _BY_ROW_CODEC[type(codec)](level=codec.level)


def register() -> None:
    """Make zarr-python know these codecs, also where the package's entry points are not installed."""
    for codec in _BY_ROW_CODEC.values():
        register_codec(codec.row_codec.codec_id, codec)

"""The codec of each field: `none` uses none, `lossless` bit-exact ones, `int8` also rounds the velocity to 8 bits."""

from collections.abc import Callable

from secondcast.storage_schemas.codecs.byte_planes import BytePlanes
from secondcast.storage_schemas.codecs.step_delta import StepDelta
from secondcast.storage_schemas.codecs.step_int8 import StepInt8
from secondcast.storage_schemas.schema.fields import Array, Field
from secondcast.storage_schemas.schema.recording import CodecName

FieldCodec = BytePlanes | StepDelta | StepInt8

_LOSSLESS: dict[str, Callable[..., FieldCodec]] = {
    "velocity": StepDelta,
    "hidden_states": StepDelta,
    "noise": BytePlanes,
    "final_latent": BytePlanes,
    "encoder_hidden_states": BytePlanes,
    "pooled_projections": BytePlanes,
    "clip_hidden_states": BytePlanes,
}
_CODECS: dict[CodecName, dict[str, Callable[..., FieldCodec]]] = {
    "none": {},
    "lossless": _LOSSLESS,
    "int8": _LOSSLESS | {"velocity": StepInt8},
}


def field_codec(field: Field, name: CodecName) -> FieldCodec | None:
    """The codec of one row of a field; None where its bytes are stored unchanged."""
    make = _CODECS[name].get(field.name)
    return None if make is None else make(shape=field.row_shape, dtype=field.dtype.name)


def as_read(field: Field, name: CodecName, values: Array) -> Array:
    """The values read back for rows of a field, [rows, ...]: unchanged, or rounded by a lossy codec."""
    codec = field_codec(field, name)
    return codec.rounded(values) if isinstance(codec, StepInt8) else values

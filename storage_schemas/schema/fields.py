"""The arrays of a cache: name (as in FLUX's forward where it has one), shape of one row, dtype.

Shape letters: K steps, S image tokens, C packed channels, T text tokens, D text width, P pooled width, L rows of CLIP,
W their width.
"""

from dataclasses import dataclass

import ml_dtypes
import numpy as np

from secondcast.storage_schemas.schema.commits import KINDS, Kind
from secondcast.storage_schemas.schema.manifest import Manifest

Array = np.ndarray
Arrays = dict[str, Array]

POOLED = "pooled_projections"
TEXT_MASK = "encoder_attention_mask"
DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}


@dataclass(frozen=True, kw_only=True)
class Field:
    """One array: `row_shape` is the shape for one trajectory (or prompt), `letters` names its axes."""

    name: str
    row_shape: tuple[int, ...]
    letters: str
    dtype: np.dtype

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, uncompressed."""
        return int(np.prod(self.row_shape, dtype=np.int64)) * self.dtype.itemsize


def kinds_of(manifest: Manifest) -> tuple[Kind, ...]:
    """The kinds of shards that a cache may have; a text cache has embeddings only."""
    return ("embeddings",) if manifest.is_text else KINDS


def fields_of(manifest: Manifest, kind: Kind) -> tuple[Field, ...]:
    """The arrays in a shard of this kind in this cache, in the order in which they are written."""
    teacher, dtype = manifest.teacher, DTYPES[manifest.dtype]
    if kind == "embeddings":
        shape = (teacher.text_length, teacher.text_width)
        embedding = Field(name="encoder_hidden_states", row_shape=shape, letters="TD", dtype=dtype)
        pooled = Field(name=POOLED, row_shape=(teacher.pooled_width,), letters="P", dtype=dtype)
        others = [
            Field(name=array.name, row_shape=array.shape, letters=array.letters, dtype=dtype)
            for array in teacher.conditioning or ()
        ]
        return (embedding, *([] if teacher.pooled == "zero" else [pooled]), *others)
    sampling = manifest.sampling
    latent = (sampling.image_tokens, sampling.channels)
    walk = (sampling.steps, *latent)
    start = (
        Field(name="hidden_states", row_shape=walk, letters="KSC", dtype=dtype)
        if sampling.storage.latents == "stored"
        else Field(name="noise", row_shape=latent, letters="SC", dtype=dtype)
    )
    fields = (
        Field(name="velocity", row_shape=walk, letters="KSC", dtype=dtype),
        start,
        Field(name="final_latent", row_shape=latent, letters="SC", dtype=dtype),
    )
    if sampling.guidance is None:
        return fields
    return (*fields, Field(name="guidance", row_shape=(), letters="", dtype=np.dtype(np.float32)))


def check_arrays(fields: tuple[Field, ...], arrays: Arrays, rows: int) -> None:
    """Raise ValueError unless `arrays` has exactly these fields with `rows` rows each."""
    if set(arrays) != {field.name for field in fields}:
        raise ValueError(f"fields are {sorted(arrays)}, expected {sorted(field.name for field in fields)}")
    for field in fields:
        found, expected = arrays[field.name], (rows, *field.row_shape)
        if found.shape != expected or found.dtype != field.dtype:
            raise ValueError(f"{field.name} is {found.dtype} {found.shape}, expected {field.dtype} {expected}")


def same_bits(a: Array, b: Array) -> bool:
    """Whether two arrays are equal bit for bit: -0.0 differs from 0.0, a NaN equals itself."""
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def is_finite(array: Array) -> bool:
    """Whether all elements are finite."""
    return bool(np.isfinite(array).all())

"""The webdataset format: one tar per shard, one sample per trajectory (<key>.safetensors + <key>.json).

`webdataset` writes the tars; a byte index beside each (<shard>.index.json) gives random access. Samples are
read as safetensors by position, never through webdataset's decoders, which unpickle. `webdataset` imports
torch, so it is imported only for writing tars.
"""

import io
import json
import tarfile
from collections.abc import Container
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from secondcast.storage_schemas.codecs.by_field import FieldCodec, field_codec
from secondcast.storage_schemas.formats.files import ByteSource, MemoryFiles
from secondcast.storage_schemas.formats.shard_format import damaged_shard
from secondcast.storage_schemas.io.digests import canonical_json
from secondcast.storage_schemas.record import Label
from secondcast.storage_schemas.schema.commits import Kind
from secondcast.storage_schemas.schema.fields import Array, Arrays, Field, fields_of, kinds_of
from secondcast.storage_schemas.schema.manifest import Manifest

_CODECS_KEY = "secondcast.codecs"
_NAMES = {"BF16": "bfloat16", "F32": "float32"}
# Errors that readers raise for bytes that are not an index, a safetensors file or an encoded array.
_NO_SAMPLE = (safetensors.SafetensorError, LookupError, ValueError, TypeError, AttributeError, RecursionError)


class WebDatasetFormat:
    """Encode and decode shards as tars of safetensors."""

    def __init__(self, manifest: Manifest, *, metadata: dict[str, bytes] | None = None) -> None:
        self._fields: dict[Kind, tuple[Field, ...]] = {kind: fields_of(manifest, kind) for kind in kinds_of(manifest)}
        name, every = manifest.storage.compression, [field for fields in self._fields.values() for field in fields]
        self._codecs = {field.name: codec for field in every if (codec := field_codec(field, name))}

    def metadata(self) -> dict[str, bytes]:
        """None: a tar needs only its index."""
        return {}

    def encode(self, kind: Kind, shard: int, arrays: Arrays, labels: list[Label]) -> dict[str, bytes]:
        """The tar and the byte index of one shard: {path within the cache: bytes}. Equal input, equal bytes."""
        import webdataset

        stream = io.BytesIO()
        # A fixed time and owner, so that the bytes of a shard depend only on its content.
        with webdataset.TarWriter(stream, user="secondcast", group="secondcast", mode=0o644, mtime=0) as writer:
            for row, label in enumerate(labels):
                sample = {field.name: np.asarray(arrays[field.name][row], order="C") for field in self._fields[kind]}
                writer.write(
                    {
                        "__key__": label["key"],
                        "safetensors": _encode_sample(sample, self._codecs),
                        "json": canonical_json(label),
                    }
                )
        tar = stream.getvalue()
        return {_tar_path(kind, shard): tar, _index_path(kind, shard): _index_of(tar)}

    def decode(self, kind: Kind, shard: int, files: dict[str, bytes], rows: int) -> Arrays:
        """The arrays of one encoded shard."""
        reader = self.reader(MemoryFiles(files))
        parts = [reader.row(kind, shard, row) for row in range(rows)]
        return {field.name: np.stack([part[field.name] for part in parts]) for field in self._fields[kind]}

    def reader(self, source: ByteSource) -> "WebDatasetReader":
        """Read rows of committed shards."""
        return WebDatasetReader(source, self._fields, self._codecs)


class WebDatasetReader:
    """Rows of committed shards. The byte index of a shard is read once."""

    def __init__(
        self, source: ByteSource, fields: dict[Kind, tuple[Field, ...]], codecs: dict[str, FieldCodec]
    ) -> None:
        self._source, self._fields, self._codecs = source, fields, codecs
        self._places: dict[tuple[Kind, int], list[tuple[int, int]]] = {}

    def row(self, kind: Kind, shard: int, row: int, names: Container[str] | None = None) -> Arrays:
        """One row of a shard; only the fields in `names` if given."""
        try:
            begin, size = self._place(kind, shard, row)
            data = self._source.read(_tar_path(kind, shard), begin, begin + size)
            tensors = dict(safetensors.deserialize(data))
            stated = _stated_codecs(data) if self._codecs else {}
            return {
                field.name: _array(tensors[field.name], field, self._codecs.get(field.name), stated.get(field.name))
                for field in self._fields[kind]
                if names is None or field.name in names
            }
        except _NO_SAMPLE as error:
            raise damaged_shard(kind, shard, f"row {row} is not the expected sample ({error})") from error

    def _place(self, kind: Kind, shard: int, row: int) -> tuple[int, int]:
        places = self._places.get((kind, shard))
        if places is None:
            index = json.loads(self._source.read(_index_path(kind, shard), 0, None))
            places = self._places[kind, shard] = index["safetensors"]
        begin, size = places[row]
        if not (isinstance(begin, int) and isinstance(size, int) and begin >= 0 and size >= 0):
            raise ValueError(f"its offset is {begin!r}, its size {size!r} bytes")
        return begin, size


def _encode_sample(sample: Arrays, codecs: dict[str, FieldCodec]) -> bytes:
    used = {name: codecs[name] for name in sample if name in codecs}
    tensors = {
        name: np.frombuffer(used[name].encode(array), dtype=np.uint8) if name in used else array
        for name, array in sample.items()
    }
    # A single key: safetensors writes several in an order that changes from run to run.
    configs = {name: codec.get_config() for name, codec in used.items()}
    return safetensors.numpy.save(tensors, {_CODECS_KEY: canonical_json(configs).decode()} if used else None)


def _stated_codecs(data: bytes) -> dict[str, Any]:
    """The numcodecs configuration of each encoded field, from the metadata of a safetensors file."""
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    stated = json.loads(header.get("__metadata__", {}).get(_CODECS_KEY, "{}"))
    if not isinstance(stated, dict):
        raise ValueError(f"metadata {_CODECS_KEY} is {stated!r}, expected an object")
    return stated


def _array(tensor: dict[str, Any], field: Field, codec: FieldCodec | None, stated: Any) -> Array:
    if stated != (None if codec is None else codec.get_config()):
        raise ValueError(f"{field.name} states codec {stated}, expected {codec}")
    kind, shape, expected = tensor["dtype"], tuple(tensor["shape"]), field.row_shape
    if codec is not None:
        if kind != "U8" or len(shape) != 1:
            raise ValueError(f"{field.name} is {kind} {list(shape)}, expected U8 of one axis")
        return codec.decode(tensor["data"]).view(field.dtype)
    if _NAMES.get(kind) != field.dtype.name or shape != expected:
        raise ValueError(f"{field.name} is {kind} {list(shape)}, expected {field.dtype} {list(expected)}")
    return np.frombuffer(tensor["data"], dtype=field.dtype).reshape(expected)


def _index_of(tar: bytes) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(tar)) as members:
        places = [(m.offset_data, m.size) for m in members if m.name.endswith(".safetensors")]
    return canonical_json({"safetensors": places})


def _tar_path(kind: Kind, shard: int) -> str:
    return f"{kind}/{shard:06d}.tar"


def _index_path(kind: Kind, shard: int) -> str:
    return f"{kind}/{shard:06d}.index.json"

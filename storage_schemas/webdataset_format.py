"""The webdataset format: one tar per shard, one sample per trajectory (<key>.safetensors + <key>.json).

`webdataset` writes the tars; a byte index beside each (<shard>.index.json) gives random access. Samples are
read as safetensors by position, never through webdataset's decoders, which unpickle. `webdataset` imports
torch, so it is imported where a tar is written only.
"""

import io
import json
import tarfile
from collections.abc import Container
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from storage_schemas.commits import KINDS, Kind
from storage_schemas.digests import canonical_json
from storage_schemas.errors import DamagedCache
from storage_schemas.fields import Array, Arrays, Field, fields_of
from storage_schemas.files import ByteSource, MemoryFiles
from storage_schemas.manifest import Manifest
from storage_schemas.trajectory import Label


class WebDatasetFormat:
    """Encode and decode shards as tars of safetensors."""

    def __init__(self, manifest: Manifest, *, metadata: dict[str, bytes] | None = None) -> None:
        self._fields: dict[Kind, tuple[Field, ...]] = {kind: fields_of(manifest, kind) for kind in KINDS}

    def metadata(self) -> dict[str, bytes]:
        """A tar needs no files beside it but its index."""
        return {}

    def encode(self, kind: Kind, shard: int, arrays: Arrays, labels: list[Label]) -> dict[str, bytes]:
        """The tar and the byte index of one shard: {path within the cache: bytes}. Equal input, equal bytes."""
        import webdataset

        stream = io.BytesIO()
        # A fixed time and owner, so that the bytes of a shard depend on its content alone.
        with webdataset.TarWriter(stream, user="understudy", group="understudy", mode=0o644, mtime=0) as writer:
            for row, label in enumerate(labels):
                tensors = {field.name: np.asarray(arrays[field.name][row], order="C") for field in self._fields[kind]}
                writer.write(
                    {
                        "__key__": label["key"],
                        "safetensors": safetensors.numpy.save(tensors),
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
        return WebDatasetReader(source, self._fields)


class WebDatasetReader:
    """Rows of committed shards. The byte index of a shard is read once."""

    def __init__(self, source: ByteSource, fields: dict[Kind, tuple[Field, ...]]) -> None:
        self._source, self._fields = source, fields
        self._places: dict[tuple[Kind, int], list[tuple[int, int]]] = {}

    def row(self, kind: Kind, shard: int, row: int, names: Container[str] | None = None) -> Arrays:
        """One row of a shard; only the fields in `names` if given."""
        places = self._places.get((kind, shard))
        if places is None:
            index = json.loads(self._source.read(_index_path(kind, shard), 0, None))
            places = self._places[kind, shard] = index["safetensors"]
        begin, size = places[row]
        data = self._source.read(_tar_path(kind, shard), begin, begin + size)
        try:
            tensors = dict(safetensors.deserialize(data))
            return {
                field.name: _array(tensors[field.name], field.dtype, field.row_shape)
                for field in self._fields[kind]
                if names is None or field.name in names
            }
        except (safetensors.SafetensorError, KeyError, ValueError) as error:
            raise DamagedCache(f"{_tar_path(kind, shard)} row {row} is not the sample it should be: {error}") from error


def _array(tensor: dict[str, Any], dtype: np.dtype, shape: tuple[int, ...]) -> Array:
    names = {"BF16": "bfloat16", "F32": "float32"}
    if names.get(tensor["dtype"]) != dtype.name or tuple(tensor["shape"]) != shape:
        raise ValueError(f"tensor is {tensor['dtype']} {tensor['shape']}, expected {dtype} {list(shape)}")
    return np.frombuffer(tensor["data"], dtype=dtype).reshape(shape)


def _index_of(tar: bytes) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(tar)) as members:
        places = [(m.offset_data, m.size) for m in members if m.name.endswith(".safetensors")]
    return canonical_json({"safetensors": places})


def _tar_path(kind: Kind, shard: int) -> str:
    return f"{kind}/{shard:06d}.tar"


def _index_path(kind: Kind, shard: int) -> str:
    return f"{kind}/{shard:06d}.index.json"

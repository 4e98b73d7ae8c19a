"""The zarr format: Zarr v3, one array per field, one trajectory (or prompt) per chunk, one storage shard per shard.

A shard is encoded in memory by zarr-python to bytes, so that it can be checked, hashed and written atomically; it is
read through a store that serves committed files only and raises where zarr would return zeros.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Container, Iterable
from typing import Any

import numpy as np
import zarr
from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.codecs import BytesCodec, Crc32cCodec
from zarr.core.buffer import Buffer, BufferPrototype, default_buffer_prototype
from zarr.storage import MemoryStore

# zarr_bfloat16: imported for the data type that it registers.
from secondcast.storage_schemas.codecs import zarr_bfloat16, zarr_codecs  # noqa: F401
from secondcast.storage_schemas.codecs.by_field import field_codec
from secondcast.storage_schemas.errors import DamagedCacheError
from secondcast.storage_schemas.formats.files import ByteSource, MemoryFiles
from secondcast.storage_schemas.formats.shard_format import damaged_shard
from secondcast.storage_schemas.record import Label
from secondcast.storage_schemas.schema.commits import Kind
from secondcast.storage_schemas.schema.fields import Arrays, Field, fields_of, kinds_of
from secondcast.storage_schemas.schema.layout import Layout
from secondcast.storage_schemas.schema.manifest import Manifest

_AXES = {
    "K": "step",
    "S": "image_token",
    "C": "channel",
    "T": "text_token",
    "D": "text_width",
    "P": "pooled_width",
    "L": "clip_token",
    "W": "clip_width",
}
# The codecs that a cache's arrays may use.
_CODECS = ("bytes", "crc32c", *zarr_codecs.NAMES)
_ROW_AXIS = {"trajectories": "trajectory", "embeddings": "prompt"}

zarr_codecs.register()


class ZarrFormat:
    """Encode and decode shards as Zarr storage shards."""

    def __init__(self, manifest: Manifest, *, metadata: dict[str, bytes] | None = None) -> None:
        """`metadata`: the zarr.json files of an existing cache; None makes them from the manifest's settings."""
        layout = Layout(manifest.prompts.segments)
        self._codec = manifest.storage.compression
        self._size = layout.shard_size
        self._shards = {"trajectories": len(layout.trajectories), "embeddings": len(layout.embeddings)}
        self._fields: dict[Kind, tuple[Field, ...]] = {kind: fields_of(manifest, kind) for kind in kinds_of(manifest)}
        self._metadata = metadata if metadata is not None else self._make_metadata()

    def metadata(self) -> dict[str, bytes]:
        """The zarr.json files by path within the cache; the manifest has their checksums."""
        return self._metadata

    def encode(self, kind: Kind, shard: int, arrays: Arrays, labels: list[Label]) -> dict[str, bytes]:
        """The files of one shard: {path within the cache: bytes}. Labels are not stored: prompts.jsonl has them."""
        memory = _memory_store(self._metadata, kind)
        begin = shard * self._size
        for field in self._fields[kind]:
            data = arrays[field.name]
            # A chunk equal to the fill value is still written: presence is what a reader checks.
            array = zarr.open_array(memory, path=field.name, mode="r+", config={"write_empty_chunks": True})
            array[begin : begin + len(data)] = data
        return {
            f"{kind}.zarr/{key}": value.to_bytes()
            for key, value in sorted(memory._store_dict.items())
            if not key.endswith("zarr.json")
        }

    def decode(self, kind: Kind, shard: int, files: dict[str, bytes], rows: int) -> Arrays:
        """The arrays of one encoded shard."""
        begin = shard * self._size
        return self.reader(MemoryFiles(files)).read(kind, slice(begin, begin + rows), None)

    def reader(self, source: ByteSource) -> "ZarrReader":
        """Read rows of committed shards."""
        return ZarrReader(source, self._metadata, self._fields, self._size)

    def _make_metadata(self) -> dict[str, bytes]:
        metadata: dict[str, bytes] = {}
        for kind, fields in self._fields.items():
            memory = MemoryStore()
            group = zarr.create_group(memory)
            for field in fields:
                self._create_array(group, kind, field)
            for key, value in memory._store_dict.items():
                metadata[f"{kind}.zarr/{key}"] = value.to_bytes()
        return metadata

    def _create_array(self, group: zarr.Group, kind: Kind, field: Field) -> None:
        codec = field_codec(field, self._codec)
        group.create_array(
            field.name,
            shape=(self._shards[kind] * self._size, *field.row_shape),
            chunks=(1, *field.row_shape),
            shards=(self._size, *field.row_shape),
            dtype=field.dtype,
            # NaN, so that a missing chunk cannot pass for data.
            fill_value=float("nan"),
            serializer=BytesCodec() if codec is None else zarr_codecs.zarr_codec(codec),
            compressors=(Crc32cCodec(),),
            filters=(),
            dimension_names=(_ROW_AXIS[kind], *(_AXES[letter] for letter in field.letters)),
        )


def _array(group: zarr.Group, name: str) -> Any:
    array = group[name]
    assert isinstance(array, zarr.Array)
    return array


def _check_array_metadata(path: str, metadata: dict[str, bytes], field: Field, shard_size: int) -> None:
    """Raise DamagedCacheError unless a zarr.json describes this field with this package's codecs.

    Checked before zarr-python acts on the file. Other keys may differ between versions of zarr-python.
    """
    try:
        said = json.loads(metadata[path])
        chunk = list(field.row_shape)
        (outer,) = said["codecs"]
        inner = outer["configuration"]
        found = {
            "zarr_format": said["zarr_format"],
            "node_type": said["node_type"],
            "data_type": said["data_type"],
            "row_shape": said["shape"][1:],
            "shard_shape": said["chunk_grid"]["configuration"]["chunk_shape"],
            "chunk_shape": inner["chunk_shape"],
            "chunk_key_encoding": said["chunk_key_encoding"],
            "storage_transformers": said.get("storage_transformers", []),
            "codecs": [outer["name"], sorted({codec["name"] for codec in inner["codecs"] + inner["index_codecs"]})],
        }
    except (LookupError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise _bad_metadata(path, f"it is not the description of a sharded array ({error})") from error
    expected = {
        "zarr_format": 3,
        "node_type": "array",
        "data_type": field.dtype.name,
        "row_shape": chunk,
        "shard_shape": [shard_size, *chunk],
        "chunk_shape": [1, *chunk],
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "storage_transformers": [],
        "codecs": ["sharding_indexed", [name for name in found["codecs"][1] if name in _CODECS]],
    }
    for name, value in expected.items():
        if found[name] != value:
            raise _bad_metadata(path, f"its {name} is {found[name]!r}, expected {value!r}")


def _bad_metadata(path: str, what: str) -> DamagedCacheError:
    return DamagedCacheError(
        f"{path} was not written by this program, although the manifest has its checksum: {what}; "
        f"use another copy of the cache"
    )


def _memory_store(metadata: dict[str, bytes], kind: Kind) -> MemoryStore:
    prefix = f"{kind}.zarr/"
    make = default_buffer_prototype().buffer.from_bytes
    return MemoryStore({key[len(prefix) :]: make(data) for key, data in metadata.items() if key.startswith(prefix)})


class ZarrReader:
    """Rows of committed shards. Arrays are opened once; a row is one chunk per field."""

    def __init__(
        self,
        source: ByteSource,
        metadata: dict[str, bytes],
        fields: dict[Kind, tuple[Field, ...]],
        shard_size: int,
    ) -> None:
        self._size = shard_size
        self._arrays: dict[Kind, dict[str, Any]] = {}
        for kind, of_kind in fields.items():
            for field in of_kind:
                _check_array_metadata(f"{kind}.zarr/{field.name}/zarr.json", metadata, field, shard_size)
            store = _ReadStore(source, metadata, f"{kind}.zarr")
            try:
                # Not from a group's consolidated metadata, which was not checked.
                group = zarr.open_group(store, mode="r", use_consolidated=False)
                self._arrays[kind] = {field.name: _array(group, field.name) for field in of_kind}
            except (LookupError, ValueError, TypeError, OSError, AssertionError) as error:
                raise _bad_metadata(f"{kind}.zarr", str(error)) from error

    def row(self, kind: Kind, shard: int, row: int, names: Container[str] | None = None) -> Arrays:
        """One row of a shard; only the fields in `names` if given."""
        try:
            return self.read(kind, shard * self._size + row, names)
        except (ValueError, RuntimeError) as error:
            raise damaged_shard(kind, shard, f"row {row} cannot be decoded ({error})") from error

    def read(self, kind: Kind, where: int | slice, names: Container[str] | None) -> Arrays:
        """One row, or a slice of rows, of the arrays."""
        return {
            name: np.asarray(array[where])
            for name, array in self._arrays[kind].items()
            if names is None or name in names
        }


class _ReadStore(Store):
    """A read-only zarr store over a byte source; a missing chunk is an error, never zeros."""

    supports_writes = supports_deletes = supports_listing = supports_partial_writes = False

    def __init__(self, source: ByteSource, metadata: dict[str, bytes], root: str) -> None:
        super().__init__(read_only=True)
        self._source, self._metadata, self._root = source, metadata, root

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = Store.__hash__

    async def get(
        self, key: str, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """The bytes of a key; None only for metadata that does not exist in a Zarr v3 group."""
        make = (prototype or default_buffer_prototype()).buffer.from_bytes
        path = f"{self._root}/{key}"
        if "/c/" not in key and not key.endswith("/c"):
            data = self._metadata.get(path)
            return None if data is None else make(data)
        begin, end = _bounds(byte_range)
        if isinstance(self._source, MemoryFiles):
            return make(self._source.read(path, begin, end))
        return make(await asyncio.to_thread(self._source.read, path, begin, end))

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        """Several ranges."""
        return [await self.get(key, prototype, byte_range) for key, byte_range in key_ranges]

    async def exists(self, key: str) -> bool:
        """Whether metadata exists; the presence of chunks is known from the commit records."""
        return f"{self._root}/{key}" in self._metadata

    async def set(self, key: str, value: Buffer) -> None:
        """Refused."""
        raise PermissionError("a committed shard is read-only")

    async def delete(self, key: str) -> None:
        """Refused."""
        raise PermissionError("a committed shard is read-only")

    async def list(self) -> AsyncIterator[str]:
        """Keys of the metadata."""
        for path in self._metadata:
            yield path.removeprefix(f"{self._root}/")

    def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        """Keys of the metadata."""
        return self.list()

    def list_dir(self, prefix: str) -> AsyncIterator[str]:
        """Keys of the metadata."""
        return self.list()


def _bounds(byte_range: ByteRequest | None) -> tuple[int, int | None]:
    match byte_range:
        case None:
            return 0, None
        case RangeByteRequest(start=start, end=end):
            return start, end
        case OffsetByteRequest(offset=offset):
            return offset, None
        case SuffixByteRequest(suffix=suffix):
            return -suffix, None
    raise ValueError(f"byte range is {byte_range!r}, expected a range, an offset or a suffix")

"""The formats behind one small interface: arrays of a shard to files and back."""

from collections.abc import Container
from typing import Protocol

from storage_schemas.commits import Kind
from storage_schemas.errors import DamagedCache
from storage_schemas.fields import Arrays
from storage_schemas.files import ByteSource
from storage_schemas.manifest import Manifest
from storage_schemas.trajectory import Label


class ShardReader(Protocol):
    """Reads rows of committed shards."""

    def row(self, kind: Kind, shard: int, row: int, names: Container[str] | None = None) -> Arrays:
        """One row of a shard; only the fields in `names` if given."""
        ...


class ShardFormat(Protocol):
    """Encodes and decodes shards."""

    def metadata(self) -> dict[str, bytes]:
        """Files that stand beside the shards, by path within the cache."""
        ...

    def encode(self, kind: Kind, shard: int, arrays: Arrays, labels: list[Label]) -> dict[str, bytes]:
        """The files of one shard: {path within the cache: bytes}."""
        ...

    def decode(self, kind: Kind, shard: int, files: dict[str, bytes], rows: int) -> Arrays:
        """The arrays of one encoded shard."""
        ...

    def reader(self, source: ByteSource) -> ShardReader:
        """Read rows of committed shards."""
        ...


def damaged_shard(kind: Kind, shard: int, what: str) -> DamagedCache:
    """The error for a shard whose bytes are not what its format and codec say, with the way out."""
    return DamagedCache(
        f"{kind} shard {shard}: {what}: it is damaged; `understudy repair CACHE "
        f"--teacher TEACHER` rebuilds it, `understudy repair CACHE --from COPY` takes it from another copy of the cache"
    )


def format_of(manifest: Manifest, *, metadata: dict[str, bytes] | None = None) -> ShardFormat:
    """The format that a manifest names."""
    if manifest.sampling.storage.format == "zarr":
        from storage_schemas.zarr_format import ZarrFormat

        return ZarrFormat(manifest, metadata=metadata or None)
    from storage_schemas.webdataset_format import WebDatasetFormat

    return WebDatasetFormat(manifest)

"""The interface of a shard format: arrays of a shard to files and back."""

from collections.abc import Container
from typing import Protocol

from secondcast.storage_schemas.errors import DamagedCacheError
from secondcast.storage_schemas.formats.files import ByteSource
from secondcast.storage_schemas.record import Label
from secondcast.storage_schemas.schema.commits import Kind
from secondcast.storage_schemas.schema.fields import Arrays


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


def damaged_shard(kind: Kind, shard: int, what: str) -> DamagedCacheError:
    """The error for a shard whose bytes are not what its format and codec say, with the way out."""
    return DamagedCacheError(
        f"{kind} shard {shard}: {what}: it is damaged; `secondcast repair CACHE "
        f"--teacher TEACHER` rebuilds it, `secondcast repair CACHE --from COPY` takes it from another copy of the cache"
    )

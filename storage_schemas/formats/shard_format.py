"""The interface of a shard format: encodes the arrays of a shard to files and decodes them."""

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
        """Files beside the shards, by path within the cache."""
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
    """The error for a shard whose bytes are invalid for its format and codec, with the fix."""
    return DamagedCacheError(
        f"{kind} shard {shard}: {what}: it is damaged; rebuild it with `secondcast repair CACHE --teacher TEACHER`, or "
        f"restore it from another copy with `secondcast repair CACHE --from COPY`"
    )

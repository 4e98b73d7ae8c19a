"""Commit records, one JSON file per finished shard, never replaced: a shard exists only if it has one."""

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any, Literal, Self

from pydantic import ValidationError, field_validator

from secondcast.storage_schemas.errors import DamagedCacheError, MisplacedFileError, NewerCacheError
from secondcast.storage_schemas.io.digests import digest
from secondcast.storage_schemas.io.folders import Folder
from secondcast.storage_schemas.schema.index import Index, index_bytes
from secondcast.storage_schemas.schema.json_files import Record, stays_inside, verify_digest, with_digest
from secondcast.storage_schemas.schema.problems import first_problem, newer_problem

COMMITS_FOLDER = "commits"
INDEX_FILE = "index.json"
_RECORD_FORMAT = "secondcast-commit"
_READERS = 16

Kind = Literal["trajectories", "embeddings"]
KINDS: tuple[Kind, ...] = ("trajectories", "embeddings")
_SHARD_FOLDERS = tuple(kind + end for kind in KINDS for end in (".zarr", ""))


class FileRecord(Record):
    """Path, size in bytes and checksum of a file of the cache."""

    path: str
    bytes: int
    xxh3_128: str

    @field_validator("path")
    @classmethod
    def _stays_inside(cls, path: str) -> str:
        if not stays_inside(path):
            raise ValueError(f"path {path!r} is outside the cache")
        if path.split("/")[0] not in _SHARD_FOLDERS:
            raise ValueError(f"path {path!r} is in no folder of shards ({', '.join(_SHARD_FOLDERS)})")
        return path


class CommitRecord(Record):
    """Record of a finished shard.

    content: digest of everything that its bytes depend on.
    raw_bytes: size of its arrays.
    provenance: versions, device, batch size, threads; recorded, never validated.
    """

    kind: Kind
    shard: int
    segment: int
    rows: int
    content: str
    files: tuple[FileRecord, ...]
    raw_bytes: int
    seconds: float
    finished_at: str
    provenance: dict[str, Any]

    def encode(self) -> bytes:
        """The bytes of the record's file."""
        return with_digest({"format": _RECORD_FORMAT, **self.json_value()})

    @classmethod
    def decode(cls, data: bytes, where: str) -> Self:
        """Decode a record; DamagedCacheError if it differs from what was written."""
        body = verify_digest(data, where, expected_format=_RECORD_FORMAT)
        return cls._validated({key: value for key, value in body.items() if key != "format"}, where)

    @classmethod
    def _validated(cls, body: dict[str, Any], where: str) -> Self:
        try:
            return cls.model_validate(body)
        except ValidationError as error:
            if problem := newer_problem(where, error):
                raise NewerCacheError(problem) from error
            raise DamagedCacheError(f"{where} is not a valid commit record: {first_problem(error)}") from error


def record_name(kind: Kind, shard: int) -> str:
    """Name of a record within commits/."""
    return f"{kind}-{shard:06d}.json"


def record_path(kind: Kind, shard: int) -> str:
    """Path of a record within the cache."""
    return f"{COMMITS_FOLDER}/{record_name(kind, shard)}"


def content_digest(recording_digest: str, prompt_ids: list[str], samples_per_prompt: list[int]) -> str:
    """Digest of what the bytes of a shard depend on: recording digest, prompt ids, sample indices."""
    return digest([recording_digest, prompt_ids, samples_per_prompt])


class Records(Mapping[tuple[Kind, int], CommitRecord]):
    """Commit records by kind and shard. Records of an index are parsed on first access.

    A cache of a million trajectories has tens of thousands; opening it must not parse them all.
    """

    def __init__(self, records: Iterable[CommitRecord], where: str = "", *, index: Index | None = None) -> None:
        self._records = {(record.kind, record.shard): record for record in records}
        self._index, self._where = index, where
        self._owners: dict[str, CommitRecord] | None = None

    def __getitem__(self, key: tuple[Kind, int]) -> CommitRecord:
        if key not in self._records and self._index is not None:
            record = CommitRecord._validated(self._index.entry(self._index.lines[key]), self._where)
            if (record.kind, record.shard) != key:
                raise DamagedCacheError(
                    f"{self._where} has {record.kind} shard {record.shard} where {key[0]} shard {key[1]} should be: "
                    f"delete it and rerun the build command to rewrite it"
                )
            self._records[key] = record
        return self._records[key]

    def __iter__(self) -> Iterator[tuple[Kind, int]]:
        return iter(list(self._keys))

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, key: object) -> bool:
        return key in self._keys

    @property
    def _keys(self) -> Mapping[Any, Any]:
        return self._records if self._index is None else self._index.lines

    def rows(self, kind: Kind) -> int:
        """Number of committed trajectories, or embeddings."""
        if self._index is not None:
            return int(self._index.header[kind])
        return sum(record.rows for record in self._records.values() if record.kind == kind)

    @property
    def bytes(self) -> int:
        """Bytes of all committed files."""
        if self._index is not None:
            return int(self._index.header["bytes"])
        return sum(file.bytes for record in self._records.values() for file in record.files)

    def owner(self, path: str) -> tuple[FileRecord, CommitRecord] | None:
        """The record that names a file, and its entry for that file; None if no record does."""
        record = self._owner(path)
        if record is None:
            return None
        return next(file for file in record.files if file.path == path), record

    def _owner(self, path: str) -> CommitRecord | None:
        if self._index is not None:
            line = self._index.line_of(path)
            return None if line is None else self[self._key_of_line[line]]
        if self._owners is None:
            self._owners = {file.path: record for record in self._records.values() for file in record.files}
        return self._owners.get(path)

    @cached_property
    def _key_of_line(self) -> list[tuple[Kind, int]]:
        return list(self._keys)


def read_records(folder: Folder) -> tuple[Records, bool]:
    """Read all records of a cache, from the index if the build is finished, else one by one; and whether it is."""
    where = f"{folder}/{COMMITS_FOLDER}/{INDEX_FILE}"
    try:
        data = folder.read(f"{COMMITS_FOLDER}/{INDEX_FILE}")
    except FileNotFoundError:
        return Records(read_single_records(folder)), False
    return Records((), where, index=Index(data, where)), True


def read_single_records(folder: Folder, names: list[str] | None = None) -> list[CommitRecord]:
    """Read the single record files in commits/, or only these, in the order of their names."""
    if names is None:
        names = [name for name in folder.names(COMMITS_FOLDER) if _is_record(name)]

    def read(name: str) -> CommitRecord:
        record = CommitRecord.decode(folder.read(name), f"{folder}/{name}")
        if name != record_path(record.kind, record.shard):
            raise MisplacedFileError(
                f"{folder}/{name} is the record of {record.kind} shard {record.shard}: it was moved or copied; "
                f"delete it"
            )
        return record

    with ThreadPoolExecutor(_READERS) as pool:
        return list(pool.map(read, names))


def _is_record(name: str) -> bool:
    parts = name.split("/")
    return len(parts) == 2 and parts[1].endswith(".json") and parts[1].split("-")[0] in KINDS


def committed_shards(folder: Folder, kind: Kind) -> set[int]:
    """Numbers of the shards of a kind that have a record, by file name alone."""
    prefix, end = f"{COMMITS_FOLDER}/{kind}-", ".json"
    names = [name for name in folder.names(COMMITS_FOLDER) if name.startswith(prefix) and name.endswith(end)]
    return {int(number) for name in names if (number := name[len(prefix) : -len(end)]).isdigit()}


def is_published(folder: Folder, record: CommitRecord) -> bool:
    """Whether this shard has a record already."""
    return folder.size(record_path(record.kind, record.shard)) is not None


def publish_record(folder: Folder, record: CommitRecord) -> bool:
    """Publish a record; False if one for this shard exists already."""
    return folder.publish(record_path(record.kind, record.shard), record.encode())


def publish_index(folder: Folder, records: Records) -> None:
    """Write the index of a finished build: all records and the counts."""
    folder.replace(f"{COMMITS_FOLDER}/{INDEX_FILE}", encode_index(records))


def encode_index(records: Records) -> bytes:
    """The bytes of the index."""
    counts: dict[str, int] = {kind: records.rows(kind) for kind in KINDS}
    entries = [records[key].json_value() for key in sorted(records)]
    return index_bytes(entries, {**counts, "bytes": records.bytes})

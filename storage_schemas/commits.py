"""Commit records: the only proof that a shard exists. One JSON file per finished shard, never replaced."""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import ValidationError, field_validator

from storage_schemas import durable
from storage_schemas.digests import digest
from storage_schemas.errors import DamagedCache
from storage_schemas.manifest import Record, first_problem, sealed, unsealed

COMMITS_FOLDER = "commits"
INDEX_FILE = "index.json"
_RECORD_FORMAT = "understudy-commit"
_INDEX_FORMAT = "understudy-index"

Kind = Literal["trajectories", "embeddings"]
KINDS: tuple[Kind, ...] = ("trajectories", "embeddings")


class FileRecord(Record):
    """A file of the cache, its size in bytes and its checksum."""

    path: str
    bytes: int
    xxh3_128: str

    @field_validator("path")
    @classmethod
    def _stays_inside(cls, path: str) -> str:
        if path.startswith(("/", "\\")) or ".." in path.split("/"):
            raise ValueError(f"path {path!r} leads out of the cache")
        return path


class CommitRecord(Record):
    """A finished shard. `content` is the digest of all that its bytes depend on; `raw_bytes` its arrays' size.

    `provenance` (versions, device, batch size, threads) is recorded and never refused.
    """

    kind: Kind
    shard: int
    generation: int
    rows: int
    content: str
    files: tuple[FileRecord, ...]
    raw_bytes: int
    seconds: float
    finished_at: str
    provenance: dict[str, Any]

    def encode(self) -> bytes:
        """The bytes of the record's file."""
        return sealed({"format": _RECORD_FORMAT, **self.json_value()})

    @classmethod
    def decode(cls, data: bytes, where: str) -> Self:
        """Read a record; DamagedCache if it is not what was written."""
        body = unsealed(data, where, expected_format=_RECORD_FORMAT)
        return cls._validated({key: value for key, value in body.items() if key != "format"}, where)

    @classmethod
    def _validated(cls, body: dict[str, Any], where: str) -> Self:
        try:
            return cls.model_validate(body)
        except ValidationError as error:
            raise DamagedCache(f"{where} is not a valid commit record: {first_problem(error)}") from error


Records = dict[tuple[Kind, int], CommitRecord]


def record_name(kind: Kind, shard: int) -> str:
    """Name of a record within commits/."""
    return f"{kind}-{shard:06d}.json"


def content_digest(sampling_digest: str, prompt_ids: list[str], replicas: list[int]) -> str:
    """Digest of what the bytes of a shard depend on: sampling digest, prompt ids, replicas."""
    return digest([sampling_digest, prompt_ids, replicas])


def read_records(cache: Path) -> tuple[Records, bool]:
    """All records of a cache, from the index of a finished build or else one by one; and whether it is finished."""
    index = cache / COMMITS_FOLDER / INDEX_FILE
    if index.is_file():
        body = unsealed(index.read_bytes(), str(index), expected_format=_INDEX_FORMAT)
        records = [CommitRecord._validated(entry, str(index)) for entry in body["records"]]
        return {(record.kind, record.shard): record for record in records}, True
    found: Records = {}
    for path in sorted((cache / COMMITS_FOLDER).glob("*-*.json")):
        record = CommitRecord.decode(path.read_bytes(), str(path))
        if path.name != record_name(record.kind, record.shard):
            raise DamagedCache(f"{path} is the record of {record.kind} shard {record.shard}: it was moved or copied")
        found[record.kind, record.shard] = record
    return found, False


def is_published(cache: Path, record: CommitRecord) -> bool:
    """Whether this shard has a record already."""
    return (cache / COMMITS_FOLDER / record_name(record.kind, record.shard)).exists()


def publish_record(cache: Path, record: CommitRecord) -> bool:
    """Publish a record; False if one for this shard exists already."""
    return durable.publish(cache / COMMITS_FOLDER / record_name(record.kind, record.shard), record.encode())


def publish_index(cache: Path, records: Records) -> None:
    """Write the index of a finished build: all records and the counts."""
    ordered = [records[key] for key in sorted(records)]
    body = {
        "format": _INDEX_FORMAT,
        "trajectories": sum(record.rows for record in ordered if record.kind == "trajectories"),
        "embeddings": sum(record.rows for record in ordered if record.kind == "embeddings"),
        "bytes": sum(file.bytes for record in ordered for file in record.files),
        "records": [record.json_value() for record in ordered],
    }
    durable.replace(cache / COMMITS_FOLDER / INDEX_FILE, sealed(body))

"""Commit records: the only proof that a shard exists. One JSON file per finished shard, never replaced."""

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, Self

from pydantic import ValidationError, field_validator

from storage_schemas.digests import digest
from storage_schemas.errors import DamagedCache
from storage_schemas.folders import Folder
from storage_schemas.manifest import Record, first_problem, sealed, stays_inside, unsealed

COMMITS_FOLDER = "commits"
INDEX_FILE = "index.json"
_RECORD_FORMAT = "understudy-commit"
_INDEX_FORMAT = "understudy-index"
_READERS = 16

Kind = Literal["trajectories", "embeddings"]
KINDS: tuple[Kind, ...] = ("trajectories", "embeddings")
_SHARD_FOLDERS = tuple(kind + end for kind in KINDS for end in (".zarr", ""))


class FileRecord(Record):
    """A file of the cache, its size in bytes and its checksum."""

    path: str
    bytes: int
    xxh3_128: str

    @field_validator("path")
    @classmethod
    def _stays_inside(cls, path: str) -> str:
        if not stays_inside(path):
            raise ValueError(f"path {path!r} leads out of the cache")
        if path.split("/")[0] not in _SHARD_FOLDERS:
            raise ValueError(f"path {path!r} is in no folder of shards ({', '.join(_SHARD_FOLDERS)})")
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


def record_name(kind: Kind, shard: int) -> str:
    """Name of a record within commits/."""
    return f"{kind}-{shard:06d}.json"


def record_path(kind: Kind, shard: int) -> str:
    """Path of a record within the cache."""
    return f"{COMMITS_FOLDER}/{record_name(kind, shard)}"


def content_digest(sampling_digest: str, prompt_ids: list[str], replicas: list[int]) -> str:
    """Digest of what the bytes of a shard depend on: sampling digest, prompt ids, replicas."""
    return digest([sampling_digest, prompt_ids, replicas])


class Records(Mapping[tuple[Kind, int], CommitRecord]):
    """Commit records by kind and shard. Those of an index are validated when they are first asked for.

    A cache of a million trajectories has tens of thousands; opening it must not wait for all of them.
    """

    def __init__(self, entries: Iterable[dict[str, Any] | CommitRecord], where: str) -> None:
        self._where = where
        self._entries: dict[tuple[Kind, int], dict[str, Any] | CommitRecord] = {}
        for entry in entries:
            self._entries[_key(entry)] = entry
        self._owners: dict[str, tuple[Kind, int]] | None = None

    def __getitem__(self, key: tuple[Kind, int]) -> CommitRecord:
        entry = self._entries[key]
        if not isinstance(entry, CommitRecord):
            entry = self._entries[key] = CommitRecord._validated(entry, self._where)
        return entry

    def __iter__(self) -> Iterator[tuple[Kind, int]]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def rows(self, kind: Kind) -> int:
        """Committed trajectories, or embeddings."""
        return sum(_get(entry, "rows") for key, entry in self._entries.items() if key[0] == kind)

    @property
    def bytes(self) -> int:
        """Bytes of all committed files."""
        return sum(_get(file, "bytes") for entry in self._entries.values() for file in _get(entry, "files"))

    def owner(self, path: str) -> tuple[FileRecord, CommitRecord] | None:
        """The record that names a file, and what it says of it; None if no record does."""
        if self._owners is None:
            self._owners = {
                _get(file, "path"): key for key, entry in self._entries.items() for file in _get(entry, "files")
            }
        if path not in self._owners:
            return None
        record = self[self._owners[path]]
        return next(file for file in record.files if file.path == path), record


def _get(entry: Any, name: str) -> Any:
    return entry[name] if isinstance(entry, dict) else getattr(entry, name)


def _key(entry: dict[str, Any] | CommitRecord) -> tuple[Kind, int]:
    return _get(entry, "kind"), _get(entry, "shard")


def read_records(folder: Folder) -> tuple[Records, bool]:
    """All records of a cache, from the index of a finished build or else one by one; and whether it is finished."""
    where = f"{folder}/{COMMITS_FOLDER}/{INDEX_FILE}"
    try:
        data = folder.read(f"{COMMITS_FOLDER}/{INDEX_FILE}")
    except FileNotFoundError:
        return Records(read_single_records(folder), where), False
    return Records(_decode_index(data, where), where), True


def read_single_records(folder: Folder, names: list[str] | None = None) -> list[CommitRecord]:
    """The records that lie one by one in commits/, in the order of their names; of these files if given."""
    if names is None:
        names = [name for name in folder.names(COMMITS_FOLDER) if _is_record(name)]

    def read(name: str) -> CommitRecord:
        record = CommitRecord.decode(folder.read(name), f"{folder}/{name}")
        if name != record_path(record.kind, record.shard):
            raise DamagedCache(
                f"{folder}/{name} is the record of {record.kind} shard {record.shard}: it was moved or copied; "
                f"delete it"
            )
        return record

    with ThreadPoolExecutor(_READERS) as pool:
        return list(pool.map(read, names))


def _is_record(name: str) -> bool:
    parts = name.split("/")
    return len(parts) == 2 and parts[1].endswith(".json") and parts[1].split("-")[0] in KINDS


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
    """The bytes of the index. Provenance is the same for most shards and stands there once."""
    provenances: dict[str, dict[str, Any]] = {}
    numbers: dict[str, int] = {}
    entries = []
    for key in sorted(records):
        entry = records[key].json_value()
        provenance = entry.pop("provenance")
        identity = digest(provenance)
        provenances[identity] = provenance
        entries.append({**entry, "provenance": numbers.setdefault(identity, len(numbers))})
    body = {
        "format": _INDEX_FORMAT,
        "trajectories": records.rows("trajectories"),
        "embeddings": records.rows("embeddings"),
        "bytes": records.bytes,
        "provenances": list(provenances.values()),
        "records": entries,
    }
    return sealed(body, indent=None)


def _decode_index(data: bytes, where: str) -> list[dict[str, Any] | CommitRecord]:
    body = unsealed(data, where, expected_format=_INDEX_FORMAT)
    try:
        provenances = body["provenances"]
        return [{**_checked(entry), "provenance": provenances[entry["provenance"]]} for entry in body["records"]]
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise DamagedCache(
            f"{where} is not a valid index ({error}): delete it and give the build command again"
        ) from error


def _checked(entry: dict[str, Any]) -> dict[str, Any]:
    """An entry, if what is used before it is validated is what it should be; else KeyError, TypeError, ValueError."""
    if entry["kind"] not in KINDS or not isinstance(entry["shard"], int) or not isinstance(entry["rows"], int):
        raise ValueError(f"{entry['kind']!r} shard {entry['shard']!r} of {entry['rows']!r} rows")
    for file in entry["files"]:
        if not isinstance(file["path"], str) or not isinstance(file["bytes"], int):
            raise ValueError(f"{file['path']!r} of {file['bytes']!r} bytes")
    return entry

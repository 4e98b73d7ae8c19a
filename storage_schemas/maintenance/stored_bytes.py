"""Bytes on disk of each array of a cache: from the commit records; for tars from the headers of some samples."""

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from secondcast.storage_schemas.io.folders import Folder
from secondcast.storage_schemas.reader import Cache
from secondcast.storage_schemas.schema.commits import CommitRecord, Kind
from secondcast.storage_schemas.schema.fields import Field, fields_of, kinds_of

# Two reads each, issued concurrently to an object store.
SAMPLES = 16
_READERS = 16
# Upper bound of the size of a sample's header.
_HEADER_BYTES = 4096
_NO_HEADER = (OSError, LookupError, ValueError, TypeError, AttributeError, RecursionError)


@dataclass(frozen=True, kw_only=True)
class StoredArray:
    """One array of the committed shards.

    rows: number of trajectories or prompts.
    stored_bytes: None if unknown.
    sampled: 0 if stored_bytes is exact, else the number of sample headers it is extrapolated from.
    """

    name: str
    kind: Kind
    rows: int
    raw_bytes: int
    stored_bytes: int | None
    sampled: int


def stored_arrays(cache: Cache) -> list[StoredArray]:
    """The arrays of a cache in field order, without kinds that have no committed shard.

    The file names of zarr arrays identify them. For tars, the headers of up to SAMPLES samples spread over all shards
    are read, without checksums; the size of arrays without a codec is known without them.
    """
    found = []
    records = list(cache.records.values())
    for kind in kinds_of(cache.manifest):
        own = [record for record in records if record.kind == kind]
        fields = fields_of(cache.manifest, kind)
        if own:
            found += _of_zarr(own, fields) if cache.manifest.storage.format == "zarr" else _of_tars(
                cache, own, fields
            )  # fmt: skip
    return found


def _of_zarr(records: Sequence[CommitRecord], fields: Sequence[Field]) -> list[StoredArray]:
    stored = dict.fromkeys((field.name for field in fields), 0)
    for record in records:
        for file in record.files:
            name = file.path.partition("/")[2].split("/")[0]
            stored[name] = stored.get(name, 0) + file.bytes
    return [_stored(field, records, stored[field.name]) for field in fields]


def _of_tars(cache: Cache, records: Sequence[CommitRecord], fields: Sequence[Field]) -> list[StoredArray]:
    from secondcast.storage_schemas.codecs.by_field import field_codec

    codec = cache.manifest.storage.compression
    encoded = {field.name for field in fields if field_codec(field, codec) is not None}
    headers = _headers(cache.folder, records) if encoded else []
    rows = sum(record.rows for record in records)
    found = []
    for field in fields:
        if field.name not in encoded:
            found.append(_stored(field, records, rows * field.row_bytes))
            continue
        sizes = [header[field.name] for header in headers if header is not None and field.name in header]
        whole = len(sizes) == rows
        stored = round(sum(sizes) / len(sizes) * rows) if sizes else None
        found.append(_stored(field, records, stored, sampled=0 if whole or not sizes else len(sizes)))
    return found


def _stored(
    field: Field, records: Sequence[CommitRecord], stored_bytes: int | None, *, sampled: int = 0
) -> StoredArray:
    rows = sum(record.rows for record in records)
    return StoredArray(
        name=field.name,
        kind=records[0].kind,
        rows=rows,
        raw_bytes=rows * field.row_bytes,
        stored_bytes=stored_bytes,
        sampled=sampled,
    )


def _headers(folder: Folder, records: Sequence[CommitRecord]) -> list[Mapping[str, int] | None]:
    """Bytes of each tensor by name, for samples spread over all rows; None for an unreadable header."""
    rows = [(record, row) for record in records for row in range(record.rows)]
    taken = min(SAMPLES, len(rows))
    chosen = [rows[(2 * number + 1) * len(rows) // (2 * taken)] for number in range(taken)]
    with ThreadPoolExecutor(_READERS) as pool:
        return list(pool.map(lambda place: _header(folder, *place), chosen))


def _header(folder: Folder, record: CommitRecord, row: int) -> Mapping[str, int] | None:
    try:
        (tar,) = (file.path for file in record.files if file.path.endswith(".tar"))
        begin, size = json.loads(folder.read(f"{tar.removesuffix('.tar')}.index.json"))["safetensors"][row]
        data = folder.read(tar, begin, begin + min(size, _HEADER_BYTES))
        length = int.from_bytes(data[:8], "little")
        if 8 + length > len(data):
            data = folder.read(tar, begin, begin + min(size, 8 + length))
        tensors = json.loads(data[8 : 8 + length])
        return {
            name: tensor["data_offsets"][1] - tensor["data_offsets"][0]
            for name, tensor in tensors.items()
            if name != "__metadata__"
        }
    except _NO_HEADER:
        return None

"""Repairs a damaged cache from its own remaining files and from another copy.

Shards that need the teacher are rebuilt by cache_builder/repair/rebuild.py, which passes their files to `put_shard`.
"""

import hashlib
from contextlib import suppress
from dataclasses import dataclass

from secondcast.storage_schemas.errors import (
    DamagedCacheError,
    NewerCacheError,
    NotACacheError,
    SecondcastError,
    SettingsMismatchError,
)
from secondcast.storage_schemas.formats.by_manifest import format_of
from secondcast.storage_schemas.formats.files import CommittedFiles
from secondcast.storage_schemas.io.digests import xxh3_128
from secondcast.storage_schemas.io.folders import Folder, LocalFolder, Location, open_folder
from secondcast.storage_schemas.maintenance.verify import (
    INDEX_PATH,
    Problem,
    Report,
    checksum_of,
    planned_shards,
    verify,
)
from secondcast.storage_schemas.progress import Progress, Silent
from secondcast.storage_schemas.reader import TOKENIZER_FOLDER, read_manifest
from secondcast.storage_schemas.schema.commits import (
    COMMITS_FOLDER,
    CommitRecord,
    Kind,
    Records,
    encode_index,
    read_records,
    read_single_records,
    record_path,
)
from secondcast.storage_schemas.schema.comparing import differing_fields
from secondcast.storage_schemas.schema.first_difference import first_difference
from secondcast.storage_schemas.schema.journal import finish_pending
from secondcast.storage_schemas.schema.manifest import MANIFEST_FILE, Manifest
from secondcast.storage_schemas.schema.prompts import OFFSETS_FILE, PROMPTS_FILE, offset_table


@dataclass(frozen=True, kw_only=True)
class Repaired:
    """Result of a repair: repaired paths and shards, remaining problems, and planned shards without a record.

    Missing records are not a problem: the build is unfinished, or records were lost together with the index.
    """

    files: tuple[str, ...]
    shards: tuple[tuple[Kind, int], ...]
    left: tuple[Problem, ...]
    missing: int


def bad_shards(report: Report) -> list[tuple[Kind, int]]:
    """Damaged shards of a report, embeddings first: trajectories are sampled from them."""
    return sorted({problem.shard for problem in report.problems if problem.shard is not None})


def repair_cache(location: Location, copy: Location | None, progress: Progress) -> Repaired:
    """Repair what is possible without the teacher: from the cache itself, and from another copy if one is given.

    Raises NotACacheError without a readable manifest on either side, SettingsMismatchError for a copy of another cache.
    """
    folder = open_folder(location)
    source = open_folder(copy) if copy is not None else None
    files: list[str] = []
    manifest = _manifest(folder, source, files)
    if settled := finish_pending(folder):
        files += settled
        manifest = read_manifest(folder)
    report = verify(location, progress)
    if not (report.problems or (report.missing and source is not None)):
        return Repaired(files=tuple(files), shards=(), left=(), missing=report.missing)
    files += _repair_files(folder, manifest, source, report)
    files += _repair_records(folder)
    shards: list[tuple[Kind, int]] = []
    if source is not None:
        shards = _copy_shards(folder, source, verify(location, Silent()), progress)
    if repair_index(folder):
        files.append(INDEX_PATH)
    report = verify(location, Silent())
    return Repaired(files=tuple(files), shards=tuple(shards), left=report.problems, missing=report.missing)


def _manifest(folder: Folder, source: Folder | None, files: list[str]) -> Manifest:
    try:
        manifest = read_manifest(folder)
    except SecondcastError:
        if source is None:
            raise
        manifest = read_manifest(source)
        _check_is_copy(folder, source)
        folder.replace(MANIFEST_FILE, source.read(MANIFEST_FILE))
        files.append(MANIFEST_FILE)
    if source is not None:
        for field, theirs, ours in differing_fields(read_manifest(source), manifest):
            first = first_difference(theirs, ours, field)
            raise SettingsMismatchError(
                f"{source} is not a copy of {folder}: it has {first.path} = {first.one}, this cache has "
                f"{first.other}; give a copy of the same build, or make it equal with `secondcast convert`"
            )
    return manifest


def _check_is_copy(folder: Folder, source: Folder) -> None:
    """Raise NotACacheError unless a folder without a readable manifest is new, or has an identical file of the copy."""
    if isinstance(folder, LocalFolder) and folder.path.exists() and not folder.path.is_dir():
        raise NotACacheError(f"{folder} is a file, expected the folder of a damaged cache: give its folder")
    names = folder.names()
    if names and not any(_same_file(folder, source, name) for name in names if name != MANIFEST_FILE):
        raise NotACacheError(
            f"{folder} has {names[0]!r} and {len(names) - 1} more, none of which is a file of {source}, and no "
            f"readable {MANIFEST_FILE}: it is not a damaged copy of that cache; give the right folder, or a new one"
        )


def _same_file(folder: Folder, source: Folder, name: str) -> bool:
    size = source.size(name)
    return size is not None and size == folder.size(name) and folder.read(name) == source.read(name)


def _repair_files(folder: Folder, manifest: Manifest, source: Folder | None, report: Report) -> list[str]:
    """Repair files outside shards: from the copy where it is intact, else regenerated from other files if possible."""
    mended = []
    made = format_of(manifest).metadata()
    for path in dict.fromkeys(problem.path for problem in report.problems if problem.shard is None):
        expected = {PROMPTS_FILE: manifest.prompts.xxh3_128, **manifest.metadata}.get(path)
        data = manifest.encode() if path == MANIFEST_FILE else made.get(path)
        if expected is not None and source is not None and checksum_of(source, path) == expected:
            data = source.read(path)
        elif path == PROMPTS_FILE:
            data = _first_prompts(folder, manifest)
        elif path == OFFSETS_FILE:
            data = _offsets(folder, manifest)
        elif path.startswith(f"{TOKENIZER_FOLDER}/") and source is not None:
            data = _tokenizer_file(source, manifest, path)
        if data is not None and (expected is None or xxh3_128(data) == expected):
            folder.replace(path, data)
            mended.append(path)
    return mended


def _first_prompts(folder: Folder, manifest: Manifest) -> bytes | None:
    """Truncate prompts.jsonl to the manifest's size: an abandoned extension may have appended to it."""
    return None if folder.size(PROMPTS_FILE) is None else folder.read(PROMPTS_FILE, 0, manifest.prompts.bytes)


def _offsets(folder: Folder, manifest: Manifest) -> bytes | None:
    """The offset table computed from the stored lines; None if their number differs from the number of prompts."""
    if folder.size(PROMPTS_FILE) is None:
        return None
    lines = [line + b"\n" for line in folder.read(PROMPTS_FILE).split(b"\n")[:-1]]
    return offset_table(lines) if len(lines) == manifest.prompts.count else None


def _tokenizer_file(source: Folder, manifest: Manifest, path: str) -> bytes | None:
    """A tokenizer file of the copy, if it matches the manifest's checksum."""
    data = source.read(path) if source.size(path) is not None else b""
    expected = manifest.teacher.tokenizer.get(path.removeprefix(f"{TOKENIZER_FOLDER}/"))
    return data if hashlib.sha256(data).hexdigest() == expected else None


def _repair_records(folder: Folder) -> list[str]:
    """Restore lost or damaged single records from the index of a finished build."""
    try:
        records, finished = read_records(folder)
    except (DamagedCacheError, NotACacheError):
        return []
    mended = []
    for key in records if finished else ():
        path, data = record_path(*key), records[key].encode()
        if folder.size(path) is None or folder.read(path) != data:
            folder.replace(path, data)
            mended.append(path)
    return mended


def _copy_shards(folder: Folder, source: Folder, report: Report, progress: Progress) -> list[tuple[Kind, int]]:
    records = good_records(folder)
    theirs = good_records(source)
    from_copy = CommittedFiles(source, theirs, verify="always")
    # Includes shards without a record: a copy may have been built further.
    bad = sorted({*bad_shards(report), *(set(planned_shards(read_manifest(folder))) - set(records))})
    copied = []
    with progress.bar("repair", total=len(bad), done=0, unit="shards") as bar:
        for key in bad:
            record = theirs.get(key)
            try:
                files = {f.path: from_copy.read(f.path, 0, None) for f in record.files} if record else {}
            except DamagedCacheError:
                files = {}
            if record is not None and files:
                put_shard(folder, records.get(key), record, files)
                copied.append(key)
            bar.advance(1)
    return copied


def good_records(folder: Folder) -> Records:
    """The readable records of a possibly damaged cache."""
    found: dict[tuple[Kind, int], CommitRecord] = {}
    for name in folder.names(COMMITS_FOLDER):
        try:
            if name != INDEX_PATH:
                record = read_single_records(folder, [name])[0]
                found[record.kind, record.shard] = record
        except NewerCacheError:
            # To be replaced by nothing that this version knows.
            raise
        except (DamagedCacheError, NotACacheError):
            continue
    with suppress(DamagedCacheError, NotACacheError):
        found |= dict(read_records(folder)[0])
    return Records(found.values(), str(folder))


def put_shard(folder: Folder, ours: CommitRecord | None, record: CommitRecord, files: dict[str, bytes]) -> bool:
    """Write a shard's files, and its record unless the existing one has the same files; return whether it has."""
    same = ours is not None and ours.files == record.files
    for path, data in files.items():
        folder.replace(path, data)
    if not same:
        folder.replace(record_path(record.kind, record.shard), record.encode())
    return same


def repair_index(folder: Folder) -> bool:
    """Rewrite the index if every planned shard has a record and the index differs from the records."""
    try:
        single = Records(read_single_records(folder), str(folder))
    except (DamagedCacheError, NotACacheError):
        return False
    if set(single) != set(planned_shards(read_manifest(folder))):
        return False
    data = encode_index(single)
    if folder.size(INDEX_PATH) == len(data) and folder.read(INDEX_PATH) == data:
        return False
    folder.replace(INDEX_PATH, data)
    return True

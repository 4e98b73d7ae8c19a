"""Put a damaged cache right: what follows from the rest of it, and what another copy of it still has.

Shards that need the teacher are rebuilt by cache_builder/repair/rebuild.py, which hands their files to `put_shard`.
"""

import hashlib
from contextlib import suppress
from dataclasses import dataclass

from secondcast.storage_schemas.errors import DamagedCacheError, NotACacheError, SecondcastError, SettingsMismatchError
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
from secondcast.storage_schemas.schema.first_difference import first_difference
from secondcast.storage_schemas.schema.journal import finish_pending
from secondcast.storage_schemas.schema.manifest import MANIFEST_FILE, Manifest, differing_fields
from secondcast.storage_schemas.schema.prompts import OFFSETS_FILE, PROMPTS_FILE, offset_table


@dataclass(frozen=True, kw_only=True)
class Repaired:
    """What a repair did: paths and shards put right, the problems that are left, and planned shards without a record.

    Those are no fault: a build that has not come to its end, or records that were lost together with the index.
    """

    files: tuple[str, ...]
    shards: tuple[tuple[Kind, int], ...]
    left: tuple[Problem, ...]
    missing: int


def bad_shards(report: Report) -> list[tuple[Kind, int]]:
    """Shards that a report has a problem with, embeddings first: trajectories are sampled from them."""
    return sorted({problem.shard for problem in report.problems if problem.shard is not None})


def repair_cache(location: Location, copy: Location | None, progress: Progress) -> Repaired:
    """Put right what can be without the teacher: from the cache itself, and from another copy if one is given.

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
    files += _mend_files(folder, manifest, source, report)
    files += _mend_records(folder)
    shards: list[tuple[Kind, int]] = []
    if source is not None:
        shards = _copy_shards(folder, source, verify(location, Silent()), progress)
    if mend_index(folder):
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
                f"{first.other}; give a copy of the same build, or one that `secondcast convert` made equal"
            )
    return manifest


def _check_is_copy(folder: Folder, source: Folder) -> None:
    """Raise NotACacheError unless a folder without a readable manifest is new, or has a file of the copy, byte for byte."""
    if isinstance(folder, LocalFolder) and folder.path.exists() and not folder.path.is_dir():
        raise NotACacheError(f"{folder} is a file, expected the folder of a damaged cache: give that folder")
    names = folder.names()
    if names and not any(_same_file(folder, source, name) for name in names if name != MANIFEST_FILE):
        raise NotACacheError(
            f"{folder} holds {names[0]!r} and {len(names) - 1} more, none of which is a file of {source}, and no "
            f"readable {MANIFEST_FILE}: it is no damaged copy of that cache; give that folder, or a new one"
        )


def _same_file(folder: Folder, source: Folder, name: str) -> bool:
    size = source.size(name)
    return size is not None and size == folder.size(name) and folder.read(name) == source.read(name)


def _mend_files(folder: Folder, manifest: Manifest, source: Folder | None, report: Report) -> list[str]:
    """Files outside shards: from the copy where it has them whole, else made anew where they follow from others."""
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
    """What an extension that was given up, its staged files deleted, may have left behind the prompts is cut off."""
    return None if folder.size(PROMPTS_FILE) is None else folder.read(PROMPTS_FILE, 0, manifest.prompts.bytes)


def _offsets(folder: Folder, manifest: Manifest) -> bytes | None:
    """The offset table, from the lines as they lie there; None if they are not as many as there are prompts."""
    if folder.size(PROMPTS_FILE) is None:
        return None
    lines = [line + b"\n" for line in folder.read(PROMPTS_FILE).split(b"\n")[:-1]]
    return offset_table(lines) if len(lines) == manifest.prompts.count else None


def _tokenizer_file(source: Folder, manifest: Manifest, path: str) -> bytes | None:
    """A tokenizer's file of the copy, if it is the one that the manifest vouches for."""
    data = source.read(path) if source.size(path) is not None else b""
    expected = manifest.teacher.tokenizer.get(path.removeprefix(f"{TOKENIZER_FOLDER}/"))
    return data if hashlib.sha256(data).hexdigest() == expected else None


def _mend_records(folder: Folder) -> list[str]:
    """Single records that are lost or damaged, from the index of a finished build."""
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
    # Shards without a record too: a copy that was built further has them.
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
    """The readable records of a cache that may be damaged."""
    found: dict[tuple[Kind, int], CommitRecord] = {}
    for name in folder.names(COMMITS_FOLDER):
        try:
            if name != INDEX_PATH:
                record = read_single_records(folder, [name])[0]
                found[record.kind, record.shard] = record
        except (DamagedCacheError, NotACacheError):
            continue
    with suppress(DamagedCacheError, NotACacheError):
        found |= dict(read_records(folder)[0])
    return Records(found.values(), str(folder))


def put_shard(folder: Folder, ours: CommitRecord | None, record: CommitRecord, files: dict[str, bytes]) -> bool:
    """Put a shard's files in place, and its record too unless ours vouches for the same bytes; whether it does."""
    same = ours is not None and ours.files == record.files
    for path, data in files.items():
        folder.replace(path, data)
    if not same:
        folder.replace(record_path(record.kind, record.shard), record.encode())
    return same


def mend_index(folder: Folder) -> bool:
    """Write the index anew where every planned shard has a record and the index says otherwise."""
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

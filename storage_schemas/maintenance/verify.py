"""Verifies a whole cache: compares every file with its recorded checksum."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

from secondcast.storage_schemas.errors import (
    DamagedCacheError,
    MisplacedFileError,
    NewerCacheError,
    NotACacheError,
    SecondcastError,
)
from secondcast.storage_schemas.formats.files import CommittedFiles
from secondcast.storage_schemas.io.digests import xxh3_128
from secondcast.storage_schemas.io.folders import Folder, Location, open_folder
from secondcast.storage_schemas.progress import Progress, counted
from secondcast.storage_schemas.reader import TOKENIZER_FOLDER, prompt_table, read_manifest, read_metadata_file
from secondcast.storage_schemas.schema.commits import (
    COMMITS_FOLDER,
    INDEX_FILE,
    KINDS,
    CommitRecord,
    Kind,
    Records,
    content_digest,
    encode_index,
    read_records,
    read_single_records,
    record_path,
)
from secondcast.storage_schemas.schema.fields import kinds_of
from secondcast.storage_schemas.schema.journal import NEXT_MANIFEST, is_pending, is_staged, pending
from secondcast.storage_schemas.schema.layout import Layout, ShardRange
from secondcast.storage_schemas.schema.manifest import MANIFEST_FILE, Manifest
from secondcast.storage_schemas.schema.prompts import OFFSETS_FILE, PROMPTS_FILE, encode_prompts, ids_digest

INDEX_PATH = f"{COMMITS_FOLDER}/{INDEX_FILE}"


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A damaged, missing or foreign file.

    shard: the shard that it belongs to, if any.
    foreign: the file is not part of the cache and should be deleted.
    repeated: for a record, whether the index of a finished build has its correct contents.
    """

    path: str
    message: str
    shard: tuple[Kind, int] | None = None
    foreign: bool = False
    repeated: bool = True


@dataclass(frozen=True, kw_only=True)
class Report:
    """Result of a verification. `missing`: planned shards without a record, which an unfinished build may have."""

    problems: tuple[Problem, ...]
    shards: int
    bytes: int
    missing: int


def planned_shards(manifest: Manifest) -> dict[tuple[Kind, int], ShardRange]:
    """All shards of a finished cache with this manifest."""
    kinds = kinds_of(manifest) if manifest.keeps_embeddings else ("trajectories",)
    return {key: shard for key, shard in _all_shards(manifest).items() if key[0] in kinds}


def _all_shards(manifest: Manifest) -> dict[tuple[Kind, int], ShardRange]:
    layout = Layout(manifest.prompts.segments)
    ranges = {"trajectories": layout.trajectories, "embeddings": layout.embeddings}
    return {(kind, shard.shard): shard for kind in kinds_of(manifest) for shard in ranges[kind]}


def verify(location: Location, progress: Progress) -> Report:
    """Compare every file of a cache with its checksum; raise only if there is no readable manifest.

    A cache in the middle of an extension is not checked: that is the reported problem.
    """
    folder = open_folder(location)
    if is_pending(folder):
        problem = Problem(path=NEXT_MANIFEST, message=str(pending(folder)))
        return Report(problems=(problem,), shards=0, bytes=0, missing=0)
    return _Walk(folder, read_manifest(folder)).run(progress)


class _Walk:
    def __init__(self, folder: Folder, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self.planned = planned_shards(manifest)
        self.shards = self.planned
        self.problems: list[Problem] = []
        self.bytes = 0

    def run(self, progress: Progress) -> Report:
        if self.folder.read(MANIFEST_FILE) != self.manifest.encode():
            self._note(MANIFEST_FILE, "differs from what was written")
        ids = self._prompt_ids()
        for name in self.manifest.metadata:
            if name != OFFSETS_FILE:
                self._try(name, lambda name=name: read_metadata_file(self.folder, self.manifest, name))  # type: ignore[misc]
        self._check_tokenizer()
        records, finished = self._records()
        # Embeddings that are not stored exist until the build is finished.
        self.shards = self.planned if finished else _all_shards(self.manifest)
        files = CommittedFiles(self.folder, records, verify="off")
        with progress.bar("verify", total=len(records), done=0, unit="shards") as bar:
            for key in sorted(records):
                self._check_shard(key, records[key], files, ids)
                bar.advance(1)
        missing = [key for key in self.planned if key not in records]
        if finished:
            for kind, shard in missing:
                self._note(record_path(kind, shard), "is missing: this shard is planned", (kind, shard), repeated=False)
        if not (finished or missing or any(problem.path == INDEX_PATH for problem in self.problems)):
            self._note(INDEX_PATH, "is missing though every shard is committed")
        self._check_foreign(records, finished)
        return Report(
            problems=tuple(self.problems),
            shards=len(records),
            bytes=self.bytes,
            missing=0 if finished else len(missing),
        )

    def _note(self, path: str, what: str, shard: tuple[Kind, int] | None = None, **facts: bool) -> None:
        self.problems.append(Problem(path=path, message=f"{self.folder}/{path} {what}", shard=shard, **facts))

    def _try(self, path: str, check: Callable[[], object], shard: tuple[Kind, int] | None = None) -> bool:
        try:
            check()
        except (DamagedCacheError, NotACacheError) as error:
            self.problems.append(Problem(path=path, message=str(error), shard=shard))
            return False
        return True

    def _prompt_ids(self) -> list[str] | None:
        stated = self.manifest.prompts
        try:
            table = prompt_table(self.folder, self.manifest, verify="once")
            prompts = list(table)
        except (DamagedCacheError, FileNotFoundError) as error:
            bad = self._bad_prompt_files() or [PROMPTS_FILE]
            self.problems += [Problem(path=path, message=str(error)) for path in bad]
            return None
        ids = [prompt.id for prompt in prompts]
        if len(ids) != stated.count or ids_digest(ids) != stated.ids:
            self._note(
                PROMPTS_FILE, f"has {counted(len(ids), 'prompt')}, the manifest has {stated.count} different ones"
            )
            return None
        if self.folder.read(OFFSETS_FILE) != encode_prompts(prompts)[1]:
            self._note(OFFSETS_FILE, "does not match the prompts")
        return ids

    def _bad_prompt_files(self) -> list[str]:
        expected = {
            PROMPTS_FILE: self.manifest.prompts.xxh3_128,
            OFFSETS_FILE: self.manifest.metadata.get(OFFSETS_FILE),
        }
        return [path for path, checksum in expected.items() if checksum_of(self.folder, path) != checksum]

    def _check_tokenizer(self) -> None:
        for name, checksum in self.manifest.teacher.tokenizer.items():
            path = f"{TOKENIZER_FOLDER}/{name}"
            try:
                found = hashlib.sha256(self.folder.read(path)).hexdigest()
            except FileNotFoundError:
                found = "none"
            if found != checksum:
                self._note(path, f"has sha256 {found[:16]}, the manifest has {checksum[:16]}")

    def _records(self) -> tuple[Records, bool]:
        """Check every record file and the index; the records that readers use, and whether the build is finished."""
        single = self._single_records()
        try:
            records, finished = read_records(self.folder)
            # Records of an index are validated on access.
            for key in records:
                records[key]
        except SecondcastError as error:
            self.problems.append(Problem(path=INDEX_PATH, message=str(error)))
            return single, False
        if finished:
            for key in sorted(records):
                if single.get(key) != records[key] and record_path(*key) not in {p.path for p in self.problems}:
                    self._note(record_path(*key), f"is missing or differs from {INDEX_PATH}", key)
            if self.folder.read(INDEX_PATH) != encode_index(records):
                self._note(INDEX_PATH, "differs from what was written")
        return records, finished

    def _single_records(self) -> Records:
        found: list[CommitRecord] = []
        for name in self.folder.names(COMMITS_FOLDER):
            if name == INDEX_PATH:
                continue
            try:
                record = read_single_records(self.folder, [name])[0]
            except NewerCacheError:
                raise
            except (DamagedCacheError, NotACacheError) as error:
                foreign = isinstance(error, MisplacedFileError)
                self.problems.append(Problem(path=name, message=str(error), shard=_key_of(name), foreign=foreign))
                continue
            if self.folder.read(name) != record.encode():
                self._note(name, "differs from what was written", _key_of(name))
            found.append(record)
        return Records(found, str(self.folder))

    def _check_shard(
        self, key: tuple[Kind, int], record: CommitRecord, files: CommittedFiles, ids: list[str] | None
    ) -> None:
        planned = self.shards.get(key)
        if planned is None or (planned.rows, planned.segment) != (record.rows, record.segment):
            self._note(record_path(*key), "is of a shard that the manifest does not plan", key, repeated=False)
            return
        if ids is not None and record.content != shard_content(self.manifest, key[0], planned, ids):
            self._note(record_path(*key), "is of other prompts or settings than the manifest's", key, repeated=False)
        for file in record.files:
            self._try(file.path, lambda file=file: files.check(file, record, checksum=True), key)  # type: ignore[misc]
            self.bytes += file.bytes

    def _check_foreign(self, records: Records, finished: bool) -> None:
        known = {MANIFEST_FILE, PROMPTS_FILE, OFFSETS_FILE, INDEX_PATH, *self.manifest.metadata}
        known |= {f"{TOKENIZER_FOLDER}/{name}" for name in self.manifest.teacher.tokenizer}
        known |= {record_path(*key) for key in self.shards}
        known |= {file.path for record in records.values() for file in record.files}
        tops = tuple(kind + end for kind in KINDS for end in (".zarr/", "/"))
        noted = {problem.path for problem in self.problems}
        for name in self.folder.names():
            # Files of other programs, such as .gitattributes, and .cache/ in a folder that came from the hub.
            hidden = any(part.startswith(".") for part in name.split("/"))
            # Before a build is finished, files without a record are left by a killed builder and will be rewritten.
            # Incomplete staged files of a killed extension are deleted by the next builder.
            leftover = (not finished and name.startswith(tops)) or is_staged(name)
            if not (name in known or name in noted or hidden or leftover):
                self._note(name, "is not a file of this cache: delete it", foreign=True)


def shard_content(manifest: Manifest, kind: Kind, shard: ShardRange, ids: list[str]) -> str:
    """The `content` digest that the record of this shard must have."""
    layout = Layout(manifest.prompts.segments)
    items = range(shard.first, shard.first + shard.rows)
    places = [(item, 0) if kind == "embeddings" else _place(layout, item) for item in items]
    prompt_ids, samples = [ids[prompt] for prompt, _ in places], [sample_index for _, sample_index in places]
    return content_digest(manifest.recording_digest(), prompt_ids, samples)


def _place(layout: Layout, index: int) -> tuple[int, int]:
    place = layout.place(index)
    return place.prompt, place.sample_index


def _key_of(name: str) -> tuple[Kind, int] | None:
    kind, _, number = name.rsplit("/", 1)[-1].removesuffix(".json").rpartition("-")
    return (kind, int(number)) if kind in KINDS and number.isdigit() else None


def checksum_of(folder: Folder, path: str) -> str | None:
    """xxh3_128 of a file; None if it does not exist."""
    try:
        return xxh3_128(folder.read(path))
    except FileNotFoundError:
        return None

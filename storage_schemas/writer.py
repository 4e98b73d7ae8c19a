"""Create or resume a cache and commit shards to it atomically: data first, commit record last."""

from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Self

from secondcast.storage_schemas.codecs.by_field import as_read
from secondcast.storage_schemas.embeddings import drop_embeddings
from secondcast.storage_schemas.errors import DerivationMismatchError, NonFiniteError, NotACacheError, ShardLockedError
from secondcast.storage_schemas.formats.by_manifest import format_of
from secondcast.storage_schemas.io.digests import xxh3_128
from secondcast.storage_schemas.io.folders import Folder, LocalFolder, Location, open_folder
from secondcast.storage_schemas.reader import TOKENIZER_FOLDER, read_manifest
from secondcast.storage_schemas.record import Label, trajectory_key
from secondcast.storage_schemas.schema.commits import (
    COMMITS_FOLDER,
    INDEX_FILE,
    CommitRecord,
    FileRecord,
    Kind,
    Records,
    committed_shards,
    content_digest,
    is_published,
    publish_index,
    publish_record,
    read_records,
    record_path,
)
from secondcast.storage_schemas.schema.comparing import check_same_settings
from secondcast.storage_schemas.schema.derivation import derive_latents
from secondcast.storage_schemas.schema.fields import Arrays, check_arrays, fields_of, is_finite, same_bits
from secondcast.storage_schemas.schema.journal import finish_pending, locked_manifest
from secondcast.storage_schemas.schema.layout import Layout, ShardRange
from secondcast.storage_schemas.schema.manifest import MANIFEST_FILE, Manifest
from secondcast.storage_schemas.schema.prompts import OFFSETS_FILE, PROMPTS_FILE, Prompt, encode_prompts, ids_digest

Encode = Callable[[Kind, ShardRange, Arrays], dict[str, bytes]]


def prompt_set_fields(prompts: list[Prompt]) -> dict[str, Any]:
    """The manifest's fields about its prompts: counts, digest of the ids, size and checksum of prompts.jsonl."""
    lines, _ = encode_prompts(prompts)
    return {
        "count": len(prompts),
        "held_out": sum(prompt.held_out for prompt in prompts),
        "sources": dict(sorted(Counter(source for prompt in prompts for source in prompt.sources).items())),
        "ids": ids_digest(prompt.id for prompt in prompts),
        "bytes": len(lines),
        "xxh3_128": xxh3_128(lines),
    }


class CacheWriter:
    """Commits shards to one cache folder. Safe to use concurrently with other writers of the same settings."""

    def __init__(self, folder: Folder, manifest: Manifest, prompts: list[Prompt]) -> None:
        self.folder, self.manifest, self.prompts = folder, manifest, prompts
        self.layout = Layout(manifest.prompts.segments)
        self._format = format_of(manifest)
        self._recording_digest = manifest.recording_digest()

    @classmethod
    def create_or_resume(
        cls, location: Location, manifest: Manifest, prompts: list[Prompt], tokenizer_files: dict[str, bytes]
    ) -> Self:
        """Create a cache in an empty or new folder, or resume one with the same settings.

        `manifest.metadata` is filled in here. Raises NotACacheError for a folder with unrelated contents,
        SettingsMismatchError (naming the field) for a cache with other settings.
        """
        metadata = format_of(manifest).metadata()
        lines, offsets = encode_prompts(prompts)
        vouched = {OFFSETS_FILE: offsets, **metadata}
        manifest = manifest.model_copy(update={"metadata": {n: xxh3_128(data) for n, data in vouched.items()}})
        files = {PROMPTS_FILE: lines, **vouched}
        folder = open_folder(location)
        if folder.size(MANIFEST_FILE) is not None:
            return cls.resume(folder, manifest, prompts, files, tokenizer_files)
        _check_free(folder)
        # Under a lock, so that of two builders with different settings the loser cannot overwrite the winner's prompts.
        with locked_manifest(folder) as renew:
            if folder.size(MANIFEST_FILE) is None:
                folder.sweep()
                first = files | _tokenizer(tokenizer_files)
                _check_left(folder, first)
                for name, data in first.items():
                    renew()
                    folder.replace(name, data)
                # The manifest is written last and created exclusively: from then on the cache exists.
                renew()
                if folder.publish(MANIFEST_FILE, manifest.encode()):
                    return cls(folder, manifest, prompts)
        return cls.resume(folder, manifest, prompts, files, tokenizer_files)

    @classmethod
    def resume(
        cls,
        folder: Folder,
        wanted: Manifest,
        prompts: list[Prompt],
        files: dict[str, bytes],
        tokenizer_files: dict[str, bytes],
    ) -> Self:
        """Resume a cache: `files` are the files whose checksums its manifest has; missing ones are rewritten.

        Raises SettingsMismatchError (naming the field) for a cache with other settings.
        """
        finish_pending(folder)
        manifest = read_manifest(folder)
        check_same_settings(manifest, wanted, str(folder))
        folder.sweep()
        files = files | _tokenizer(tokenizer_files)
        # Another version of zarr-python may write its metadata differently: the recorded files stay.
        own = {name: data for name, data in files.items() if manifest.metadata.get(name) in (None, xxh3_128(data))}
        if lost := [name for name, data in own.items() if not _holds(folder, name, data)]:
            with locked_manifest(folder) as renew:
                # A cache that was extended in the meantime has other files.
                for name in lost if read_manifest(folder) == manifest else ():
                    renew()
                    folder.replace(name, own[name])
        return cls(folder, manifest, prompts)

    def records(self) -> Records:
        """The records of all committed shards, read from the folder at each call."""
        return read_records(self.folder)[0]

    def missing(self, kind: Kind) -> list[ShardRange]:
        """Shards without a commit record, in order; for embeddings that are not stored, only those still needed.

        Before a build is finished only the names of the records are listed: there may be thousands on a remote store.
        """
        shards = self.layout.trajectories if kind == "trajectories" else self.layout.embeddings
        there = self._committed(kind)
        missing = [shard for shard in shards if shard.shard not in there]
        if kind == "trajectories" or self.manifest.keeps_embeddings:
            return missing
        needed = {n for shard in self.missing("trajectories") for n in self.layout.embedding_shards_of(shard)}
        return [shard for shard in missing if shard.shard in needed]

    def _committed(self, kind: Kind) -> set[int]:
        if self.folder.size(f"{COMMITS_FOLDER}/{INDEX_FILE}") is None:
            return committed_shards(self.folder, kind)
        return {shard for found, shard in self.records() if found == kind}

    def commit(
        self,
        kind: Kind,
        shard: ShardRange,
        arrays: Arrays,
        *,
        seconds: float,
        provenance: dict[str, Any],
        encode: Encode | None = None,
    ) -> CommitRecord:
        """Check, encode and write one whole shard, then publish its record; `encode` replaces the method of that name.

        Raises NonFiniteError, DerivationMismatchError (nothing is written), ShardLockedError (another builder was
        first).
        """
        files = (encode or self.encode)(kind, shard, arrays)
        raw_bytes = sum(array.nbytes for array in arrays.values())
        record = self.record_of(kind, shard, files, raw_bytes=raw_bytes, seconds=seconds, provenance=provenance)
        # Under a lock, so that the slower of two builders never overwrites what the other has committed.
        with self.folder.lock(record_path(kind, shard.shard)) as renew:
            if is_published(self.folder, record):
                raise self._taken(record)
            for name, data in files.items():
                renew()
                self.folder.replace(name, data)
            renew()
            if not publish_record(self.folder, record):
                raise self._taken(record)
        return record

    def encode(self, kind: Kind, shard: ShardRange, arrays: Arrays) -> dict[str, bytes]:
        """Encode and check a shard: {path within the cache: bytes}. Nothing is written."""
        check_arrays(fields_of(self.manifest, kind), arrays, shard.rows)
        labels = self._labels(kind, shard)
        _check_finite(arrays, labels)
        files = self._format.encode(kind, shard.shard, arrays, labels)
        self._check_encoded(kind, shard, files, arrays)
        return files

    def record_of(
        self,
        kind: Kind,
        shard: ShardRange,
        files: dict[str, bytes],
        *,
        raw_bytes: int,
        seconds: float,
        provenance: dict[str, Any],
    ) -> CommitRecord:
        """The commit record of a shard's files."""
        labels = self._labels(kind, shard)
        return CommitRecord(
            kind=kind,
            shard=shard.shard,
            segment=shard.segment,
            rows=shard.rows,
            content=content_digest(
                self._recording_digest,
                [label["prompt_id"] for label in labels],
                [label.get("sample_index", 0) for label in labels],
            ),
            files=tuple(FileRecord(path=n, bytes=len(d), xxh3_128=xxh3_128(d)) for n, d in files.items()),
            raw_bytes=raw_bytes,
            seconds=round(seconds, 3),
            finished_at=datetime.now(UTC).isoformat(timespec="seconds"),
            provenance=provenance,
        )

    def finish(self) -> bool:
        """Write the index if every shard is committed (and drop embeddings that are not stored); return whether it is.

        A cache that was extended since this writer was made is left to the builder that extended it.
        """
        dropped = not self.manifest.keeps_embeddings
        if self.missing("trajectories") or (not dropped and self.missing("embeddings")):
            return False
        index = f"{COMMITS_FOLDER}/{INDEX_FILE}"
        if self.folder.size(index) is not None and not dropped:
            return True
        with locked_manifest(self.folder) as renew:
            if read_manifest(self.folder).digests() != self.manifest.digests():
                return False
            if dropped:
                drop_embeddings(self.folder)
            if self.folder.size(index) is None:
                renew()
                publish_index(self.folder, self.records())
        return True

    def _taken(self, record: CommitRecord) -> ShardLockedError:
        return ShardLockedError(
            f"{self.folder}: another builder committed {record.kind} shard {record.shard} in the meantime: nothing is "
            f"lost; stop one of the two builders"
        )

    def _labels(self, kind: Kind, shard: ShardRange) -> list[Label]:
        labels: list[Label] = []
        for item in range(shard.first, shard.first + shard.rows):
            if kind == "embeddings":
                prompt = self.prompts[item]
                labels.append({"key": prompt.id, "prompt": prompt.text, "prompt_id": prompt.id})
                continue
            place = self.layout.place(item)
            prompt = self.prompts[place.prompt]
            key = trajectory_key(prompt.id, place.sample_index)
            labels.append(
                {"key": key, "prompt": prompt.text, "prompt_id": prompt.id, "sample_index": place.sample_index}
            )
        return labels

    def _check_encoded(self, kind: Kind, shard: ShardRange, files: dict[str, bytes], arrays: Arrays) -> None:
        """Decode the encoded shard and derive its latents: a reader must get exactly what was sampled."""
        decoded = self._format.decode(kind, shard.shard, files, shard.rows)
        codec = self.manifest.storage.compression
        for field in fields_of(self.manifest, kind):
            if not same_bits(decoded[field.name], as_read(field, codec, arrays[field.name])):
                raise DerivationMismatchError(
                    f"{self.folder}: {field.name} of {kind} shard {shard.shard} decodes to bits that differ from the "
                    f"encoded ones: a fault of this machine or of a library; nothing was written"
                )
        if "noise" not in decoded:
            return
        for row in range(shard.rows):
            derived = derive_latents(decoded["noise"][row], decoded["velocity"][row], self.manifest.sampling.sigmas)
            if not same_bits(derived[-1], decoded["final_latent"][row]):
                count = int((derived[-1] != decoded["final_latent"][row]).sum())
                raise DerivationMismatchError(
                    f"{self.folder}: the final latent of trajectory {shard.first + row}, derived from noise and "
                    f"velocity, differs from the sampled one in {count} of {derived[-1].size} elements: this device "
                    f"rounds differently; build with --latents stored"
                )


def _check_finite(arrays: Arrays, labels: list[Label]) -> None:
    for name, array in arrays.items():
        if is_finite(array):
            continue
        for row, label in enumerate(labels):
            if not is_finite(array[row]):
                raise NonFiniteError(
                    f"{name} of {label['key']} ({label['prompt']!r}) is not finite: its shard was not written; "
                    f"try --dtype float32, or remove the prompt"
                )


def _tokenizer(files: dict[str, bytes]) -> dict[str, bytes]:
    return {f"{TOKENIZER_FOLDER}/{name}": data for name, data in files.items()}


def _check_free(folder: Folder) -> None:
    if isinstance(folder, LocalFolder) and folder.path.exists() and not folder.path.is_dir():
        raise NotACacheError(f"{folder} is a file, expected a new or empty folder for the cache: give another path")
    # A builder that was killed before it wrote the manifest may have left these behind: see _check_left.
    ours = {PROMPTS_FILE, OFFSETS_FILE, TOKENIZER_FOLDER, "trajectories.zarr", "embeddings.zarr"}
    foreign = [name for name in folder.entries() if name not in ours]
    # Check again: another builder may have made the cache in the meantime.
    if foreign and folder.size(MANIFEST_FILE) is None:
        raise NotACacheError(
            f"{folder} has {foreign[0]!r} and {len(folder.entries()) - 1} more, but no {MANIFEST_FILE}: it is not a "
            f"cache; give a new or empty folder"
            + (f" (or `secondcast repair {folder} --from COPY`)" if COMMITS_FOLDER in foreign else "")
        )


def _check_left(folder: Folder, files: dict[str, bytes]) -> None:
    """Raise NotACacheError if a folder without a manifest has a file that differs from what this build writes."""
    for name in folder.names():
        if name not in files or not _holds(folder, name, files[name]):
            raise NotACacheError(
                f"{folder} has {name!r}, which this build did not write, and no {MANIFEST_FILE}: it is not a cache; "
                f"move the file elsewhere, or give a new or empty folder"
            )


def _holds(folder: Folder, name: str, data: bytes) -> bool:
    return folder.size(name) == len(data) and folder.read(name) == data

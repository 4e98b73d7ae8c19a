"""Open a cache and read from it; both formats return the same records."""

import hashlib
from collections.abc import Container
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Self

import numpy as np

from secondcast.storage_schemas.errors import DamagedCacheError, NotACacheError, NotInCacheError
from secondcast.storage_schemas.formats.by_manifest import format_of
from secondcast.storage_schemas.formats.files import CommittedFiles, Verify
from secondcast.storage_schemas.formats.local_cache import LocalCache
from secondcast.storage_schemas.formats.shard_format import ShardReader
from secondcast.storage_schemas.io.digests import xxh3_128
from secondcast.storage_schemas.io.folders import Folder, LocalFolder, Location, location_of, open_folder
from secondcast.storage_schemas.progress import counted
from secondcast.storage_schemas.record import Trajectory, trajectory_key, trajectory_of
from secondcast.storage_schemas.schema.commits import Kind, Records, read_records
from secondcast.storage_schemas.schema.fields import DTYPES, POOLED, TEXT_MASK, Array, Arrays, fields_of
from secondcast.storage_schemas.schema.journal import is_pending, pending
from secondcast.storage_schemas.schema.layout import Layout
from secondcast.storage_schemas.schema.manifest import MANIFEST_FILE, NEGATIVE, Manifest, no_trajectories
from secondcast.storage_schemas.schema.prompts import OFFSETS_FILE, PromptTable
from secondcast.storage_schemas.trajectories import Trajectories

TOKENIZER_FOLDER = "tokenizer"


def read_manifest(folder: Folder) -> Manifest:
    """Read the manifest of a cache; NotACacheError if there is none."""
    if isinstance(folder, LocalFolder) and not folder.path.is_dir():
        raise NotACacheError(f"{folder} is not a folder: give the output folder of `secondcast build`")
    try:
        data = folder.read(MANIFEST_FILE)
    except FileNotFoundError as error:
        raise NotACacheError(
            f"{folder} has no {MANIFEST_FILE}: it is not a cache; give the output folder of `secondcast build`, or, if "
            f"it is one, restore the file from another copy with `secondcast repair {folder} --from COPY`"
        ) from error
    return Manifest.decode(data, f"{folder}/{MANIFEST_FILE}")


class Cache:
    """A cache, finished or still being built.

    `len` is the number of committed trajectories, `planned` the number requested. Reading one that is not
    committed raises NotInCacheError; a file that differs from its commit record raises DamagedCacheError.
    """

    def __init__(
        self,
        folder: Folder,
        manifest: Manifest,
        records: Records,
        *,
        finished: bool,
        verify: Verify,
        local_cache: LocalCache | None = None,
        open_arrays: bool = True,
    ) -> None:
        self.folder, self.manifest, self.records, self.finished = folder, manifest, records, finished
        self.layout = Layout(manifest.prompts.segments)
        self.prompts = prompt_table(folder, manifest, verify=verify)
        self.files = CommittedFiles(folder, records, verify=verify, local_cache=local_cache)
        self._metadata = read_metadata(folder, manifest)
        if open_arrays:
            _ = self._reader

    @cached_property
    def _reader(self) -> ShardReader:
        return format_of(self.manifest, metadata=self._metadata).reader(self.files)

    @classmethod
    def open(
        cls,
        location: Location,
        *,
        verify: Verify = "once",
        local_cache: LocalCache | None = None,
        open_arrays: bool = True,
    ) -> Self:
        """Open a cache: read the manifest and the commit records (one index file once finished), but no prompts.

        local_cache: keeps copies of the shard files read, on this machine; several caches may share it.
        open_arrays: False defers opening the arrays to the first row read, which saves importing zarr.
        """
        folder = open_folder(location)
        manifest = read_manifest(folder)
        while True:
            records, finished = read_records(folder)
            try:
                return cls(
                    folder, manifest, records, finished=finished, verify=verify, local_cache=local_cache,
                    open_arrays=open_arrays,
                )  # fmt: skip
            except DamagedCacheError as error:
                # The files may belong to a newer manifest that was put in place while they were read.
                between = is_pending(folder)
                before, manifest = manifest, read_manifest(folder)
                if manifest == before:
                    if between:
                        raise pending(folder) from error
                    raise

    @property
    def location(self) -> str:
        """Location of the cache: an absolute path, or a URL."""
        return location_of(self.folder)

    @property
    def planned(self) -> int:
        """Number of planned trajectories N, over all prompts and their samples; 0 in a text cache."""
        return len(self.layout)

    def require_trajectories(self, what: str) -> None:
        """Raise NoTrajectoriesError, in the name of `what`, if this is a text cache."""
        if self.manifest.is_text:
            raise no_trajectories(what, str(self.folder))

    def __len__(self) -> int:
        return self.records.rows("trajectories")

    def indices(self) -> Array:
        """Indices of the committed trajectories, ascending, int64."""
        ranges = [
            np.arange(shard.first, shard.first + shard.rows)
            for shard in self.layout.trajectories
            if ("trajectories", shard.shard) in self.records
        ]
        return np.concatenate([np.empty(0, dtype=np.int64), *ranges])

    @cached_property
    def trajectories(self) -> Trajectories:
        """The committed trajectories, in order; NoTrajectoriesError in a text cache."""
        self.require_trajectories("Cache.trajectories")
        return Trajectories(self, self.indices())

    def __repr__(self) -> str:
        return f"Cache({self.location!r})"

    def trajectory(self, index: int) -> Trajectory:
        """Read trajectory `index` with all its fields."""
        place = self.layout.place(index)
        self._require("trajectories", place.shard, f"trajectory {index}")
        row = self._reader.row("trajectories", place.shard, place.row)
        return trajectory_of(
            row,
            index=index,
            key=trajectory_key(self.prompts[place.prompt].id, place.sample_index),
            prompt=place.prompt,
            sample_index=place.sample_index,
            sigmas=self.manifest.sampling.sigmas,
        )

    def guidance(self, index: int) -> float | None:
        """Guidance scale of trajectory `index`."""
        if self.manifest.sampling.guidance is None:
            return None
        place = self.layout.place(index)
        self._require("trajectories", place.shard, f"trajectory {index}")
        return float(self._reader.row("trajectories", place.shard, place.row, ("guidance",))["guidance"])

    def embedding(self, prompt: int) -> Array:
        """The teacher's embedding of prompt number `prompt`, [T, D]."""
        return self.text_row(prompt, ("encoder_hidden_states",))["encoder_hidden_states"]

    def conditioning(self, prompt: int) -> Arrays:
        """What the transformer received with prompt number `prompt` besides its embedding, by name.

        pooled_projections [P] are zeros unless CLIP's were recorded; encoder_attention_mask [T] is int64, 1 for text.
        """
        teacher = self.manifest.teacher
        names = [field.name for field in fields_of(self.manifest, "embeddings")[1:]]
        arrays = self.text_row(prompt, names) if names else {}
        if teacher.pooled == "zero" and teacher.pooled_width:
            arrays[POOLED] = np.zeros(teacher.pooled_width, dtype=DTYPES[self.manifest.dtype])
        if teacher.text_mask is not None:
            arrays[TEXT_MASK] = (np.arange(teacher.text_length) < len(self.prompts[prompt].token_ids)).astype(np.int64)
        return arrays

    @property
    def negative(self) -> int | None:
        """The number of the negative prompt of classifier-free guidance; None without."""
        return None if self.manifest.is_text or self.manifest.sampling.negative_prompt is None else NEGATIVE

    def text_row(self, prompt: int, names: Container[str] | None = None) -> Arrays:
        """All stored text fields of prompt number `prompt` (embedding and conditioning), or only `names`."""
        shard, row = self.layout.embedding_place(prompt)
        if not self.manifest.keeps_embeddings and ("embeddings", shard) not in self.records:
            raise NotInCacheError(
                f"the embedding of prompt {prompt} is not in {self.folder}: it was built with --no-store-embeddings; "
                f"build another cache with --store-embeddings"
            )
        self._require("embeddings", shard, f"the embedding of prompt {prompt}")
        return self._reader.row("embeddings", shard, row, names)

    def padded_token_ids(self, prompt: int) -> Array:
        """Token ids of a prompt padded to the text length, [T] int64."""
        teacher = self.manifest.teacher
        ids_T = np.full(teacher.text_length, teacher.pad_token_id, dtype=np.int64)
        token_ids = self.prompts[prompt].token_ids
        ids_T[: len(token_ids)] = token_ids
        return ids_T

    def key_index(self, key: str) -> int:
        """Index of the trajectory with this key (an unambiguous prefix is enough) or this index.

        In a text cache of the prompt with this id.
        """
        what, planned = ("prompt", len(self.prompts)) if self.manifest.is_text else ("trajectory", self.planned)
        if key.isascii() and key.isdigit() and len(key) < 12:
            if int(key) >= planned:
                raise NotInCacheError(
                    f"{what} {key} is not in {self.folder}: {counted(planned, what)}, numbered 0 to {planned - 1}"
                )
            return int(key)
        found = [index for index, one in enumerate(self._keys()) if one.startswith(key)]
        if len(found) != 1:
            raise NotInCacheError(
                f"{len(found)} {what} keys of {self.folder} begin with {key!r}, expected one: "
                f"`inspect show CACHE --grep WORD` lists them"
            )
        return found[0]

    def _keys(self) -> list[str]:
        ids = [prompt.id for prompt in self.prompts]
        if self.manifest.is_text:
            return ids
        places = map(self.layout.place, range(self.planned))
        return [trajectory_key(ids[place.prompt], place.sample_index) for place in places]

    @cached_property
    def tokenizer_files(self) -> dict[str, bytes]:
        """The teacher's tokenizer, by file name; DamagedCacheError if a file differs from the manifest's."""
        return {name: self._tokenizer_file(name, sha256) for name, sha256 in self.manifest.teacher.tokenizer.items()}

    def _tokenizer_file(self, name: str, sha256: str) -> bytes:
        try:
            data = self.folder.read(f"{TOKENIZER_FOLDER}/{name}")
        except FileNotFoundError:
            data = b""
        if (found := hashlib.sha256(data).hexdigest()) != sha256:
            raise DamagedCacheError(
                f"{self.folder}/{TOKENIZER_FOLDER}/{name} has sha256 {found[:16]} ({len(data)} bytes), the manifest "
                f"has {sha256[:16]}: it was changed or lost; restore it from another copy with `secondcast repair "
                f"{self.folder} --from COPY`, or rerun the build command to rewrite it"
            )
        return data

    def _require(self, kind: Kind, shard: int, what: str) -> None:
        if (kind, shard) not in self.records:
            raise NotInCacheError(
                f"{what} is not in {self.folder} yet ({kind} shard {shard} has no commit record): "
                f"rerun the build command to make it"
            )


def prompt_table(folder: Folder, manifest: Manifest, *, verify: Verify) -> PromptTable:
    """The prompts of a cache."""
    return PromptTable(
        folder,
        count=manifest.prompts.count,
        bytes_=manifest.prompts.bytes,
        checksum=manifest.prompts.xxh3_128,
        offsets_checksum=manifest.metadata.get(OFFSETS_FILE),
        verify=verify != "off",
    )


def read_metadata(folder: Folder, manifest: Manifest) -> dict[str, bytes]:
    """The zarr.json files, compared with the manifest's checksums; DamagedCacheError where one differs."""
    names = [name for name in manifest.metadata if name != OFFSETS_FILE]
    with ThreadPoolExecutor(8) as pool:
        return dict(zip(names, pool.map(lambda name: read_metadata_file(folder, manifest, name), names), strict=True))


def read_metadata_file(folder: Folder, manifest: Manifest, name: str) -> bytes:
    """Read one zarr.json file; DamagedCacheError if it differs from the manifest's checksum."""
    try:
        data = folder.read(name)
    except FileNotFoundError:
        data = b""
    if (found := xxh3_128(data)) != manifest.metadata[name]:
        raise DamagedCacheError(
            f"{folder}/{name} has checksum {found} ({len(data)} bytes), the manifest has {manifest.metadata[name]}: "
            f"it was changed or lost; rewrite it with `secondcast repair {folder}`"
        )
    return data

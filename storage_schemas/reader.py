"""Open a cache and read from it: the same records from both formats."""

from collections.abc import Container
from pathlib import Path
from typing import Self

import numpy as np

from storage_schemas.commits import Records, read_records
from storage_schemas.digests import xxh3_128
from storage_schemas.errors import DamagedCache, NotACache, NotInCache
from storage_schemas.fields import Array
from storage_schemas.files import CommittedFiles, Verify
from storage_schemas.formats import format_of
from storage_schemas.layout import Layout
from storage_schemas.manifest import MANIFEST_FILE, Manifest
from storage_schemas.prompts import PromptTable
from storage_schemas.trajectory import Trajectory, trajectory_key, trajectory_of

TOKENIZER_FOLDER = "tokenizer"


def read_manifest(path: Path) -> Manifest:
    """The manifest of a cache folder; NotACache if there is none."""
    file = path / MANIFEST_FILE
    if not path.is_dir():
        raise NotACache(f"{path} is not a folder: give the folder that `understudy build` made")
    if not file.is_file():
        raise NotACache(
            f"{path} has no {MANIFEST_FILE}: it is not a cache; give the folder that `understudy build` made"
        )
    return Manifest.decode(file.read_bytes(), str(file))


class Cache:
    """A cache, finished or still being built.

    `len` is the number of committed trajectories; `planned` the number asked for. Reading one that is not
    committed raises NotInCache; a file that differs from its commit record raises DamagedCache.
    """

    def __init__(self, path: Path, manifest: Manifest, records: Records, *, finished: bool, verify: Verify) -> None:
        self.path, self.manifest, self.records, self.finished = path, manifest, records, finished
        self.layout = Layout(manifest.prompts.generations)
        self.prompts = PromptTable(
            path,
            count=manifest.prompts.count,
            bytes_=manifest.prompts.bytes,
            checksum=manifest.prompts.xxh3_128,
        )
        self.files = CommittedFiles(path, records.values(), verify=verify)
        self._reader = format_of(manifest, metadata=_read_metadata(path, manifest)).reader(self.files)

    @classmethod
    def open(cls, path: Path, *, verify: Verify = "once") -> Self:
        """Open a cache folder: manifest, commit records (one read of the index once finished), no prompts."""
        manifest = read_manifest(path)
        records, finished = read_records(path)
        return cls(path, manifest, records, finished=finished, verify=verify)

    @property
    def planned(self) -> int:
        """N: distinct prompts times replicas."""
        return len(self.layout)

    def __len__(self) -> int:
        return sum(record.rows for (kind, _), record in self.records.items() if kind == "trajectories")

    def indices(self) -> Array:
        """Numbers of the committed trajectories, ascending, int64."""
        ranges = [
            np.arange(shard.first, shard.first + shard.rows)
            for shard in self.layout.trajectories
            if ("trajectories", shard.shard) in self.records
        ]
        return np.concatenate([np.empty(0, dtype=np.int64), *ranges])

    def trajectory(self, index: int) -> Trajectory:
        """Trajectory number `index`, whole."""
        place = self.layout.place(index)
        self._require("trajectories", place.shard, f"trajectory {index}")
        row = self._reader.row("trajectories", place.shard, place.row)
        return trajectory_of(
            row,
            index=index,
            key=trajectory_key(self.prompts[place.prompt].id, place.replica),
            prompt=place.prompt,
            replica=place.replica,
            sigmas=self.manifest.sampling.sigmas,
        )

    def guidance(self, index: int) -> float | None:
        """Guidance of trajectory `index`."""
        if self.manifest.sampling.guidance is None:
            return None
        place = self.layout.place(index)
        self._require("trajectories", place.shard, f"trajectory {index}")
        return float(self._reader.row("trajectories", place.shard, place.row, ("guidance",))["guidance"])

    def embedding(self, prompt: int) -> Array:
        """The teacher's embedding of prompt number `prompt`, [T, D]."""
        shard, row = self.layout.embedding_place(prompt)
        if self.manifest.sampling.storage.embeddings == "none" and ("embeddings", shard) not in self.records:
            raise NotInCache(
                f"the embedding of prompt {prompt} is not in {self.path}: it was built with --embeddings none; "
                f"build another cache with --embeddings stored"
            )
        self._require("embeddings", shard, f"the embedding of prompt {prompt}")
        names: Container[str] = ("encoder_hidden_states",)
        return self._reader.row("embeddings", shard, row, names)["encoder_hidden_states"]

    def padded_token_ids(self, prompt: int) -> Array:
        """Token ids of a prompt padded to the text length, [T] int64."""
        teacher = self.manifest.teacher
        ids_T = np.full(teacher.text_length, teacher.pad_token_id, dtype=np.int64)
        token_ids = self.prompts[prompt].token_ids
        ids_T[: len(token_ids)] = token_ids
        return ids_T

    def key_index(self, key: str) -> int:
        """Number of the trajectory with this key (an unambiguous beginning will do) or this number."""
        if key.isdigit() and len(key) < 12:
            if int(key) >= self.planned:
                raise NotInCache(f"trajectory {key} is not in {self.path}: it has 0 to {self.planned - 1}")
            return int(key)
        ids = [prompt.id for prompt in self.prompts]
        found = [
            i
            for i in range(self.planned)
            if trajectory_key(ids[(p := self.layout.place(i)).prompt], p.replica).startswith(key)
        ]
        if len(found) != 1:
            raise NotInCache(
                f"{len(found)} trajectories of {self.path} begin with {key!r}, expected one: "
                f"`inspect show CACHE --grep WORD` lists them"
            )
        return found[0]

    def _require(self, kind: str, shard: int, what: str) -> None:
        if (kind, shard) not in self.records:
            raise NotInCache(
                f"{what} is not in {self.path} yet ({kind} shard {shard} has no commit record): "
                f"give the build command again to make it"
            )


def _read_metadata(path: Path, manifest: Manifest) -> dict[str, bytes]:
    metadata = {}
    for name, checksum in manifest.metadata.items():
        file = path / name
        data = file.read_bytes() if file.is_file() else b""
        if (found := xxh3_128(data)) != checksum:
            raise DamagedCache(
                f"{file} has checksum {found} ({len(data)} bytes), the manifest says {checksum}: "
                f"it was changed or lost; give the build command again to write it anew"
            )
        metadata[name] = data
    return metadata

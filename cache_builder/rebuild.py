"""Rebuild the damaged shards of a cache with the teacher: the same bytes, or none."""

import time
from typing import Any

import torch

from cache_builder.provenance import provenance
from cache_builder.sample_stage import sample_shard
from cache_builder.text_stage import encode_shard
from models.attention import NATIVE, RECORDED_NATIVE, backend_of_record, check_attention
from models.backbone import FluxBackbone
from models.geometry import recorded_geometry
from models.schedule import DTYPES
from models.teacher_folder import TeacherFolder
from models.text_encoder import TeacherTextEncoder
from storage_schemas.commits import CommitRecord, Kind
from storage_schemas.embeddings import drop_embeddings
from storage_schemas.errors import BadSettings, DamagedCache
from storage_schemas.folders import Location, open_folder
from storage_schemas.layout import ShardRange
from storage_schemas.manifest import Manifest, Teacher, check_same_teacher
from storage_schemas.progress import Progress, Silent
from storage_schemas.reader import Cache, prompt_table, read_manifest
from storage_schemas.repair import bad_shards, good_records, mend_index, put_shard
from storage_schemas.verification import planned_shards, verify
from storage_schemas.writer import CacheWriter

DEFAULT_BATCH_SIZE = 16


def rebuild(
    location: Location,
    teacher: TeacherFolder,
    device: torch.device,
    progress: Progress,
    *,
    batch_size: int | None,
    accept_other_bytes: bool,
) -> list[tuple[Kind, int]]:
    """Sample every bad shard again and put it back; the shards that were rebuilt.

    batch_size: None for that of each shard's record. Raises DamagedCache, and leaves the shard as it is, where the
    new bytes are not those of the record (another device, batch size or library) and that was not accepted.
    """
    folder = open_folder(location)
    manifest = read_manifest(folder)
    check_same_teacher(manifest, _identity(teacher, manifest), str(folder))
    bad = bad_shards(verify(location, progress))
    if not bad:
        return []
    if manifest.sampling.storage.embeddings == "none":
        drop_embeddings(folder)
    work = _Rebuild(location, manifest, teacher, device, batch_size, accept_other_bytes)
    with progress.bar("rebuild", total=len(bad), done=0, unit="shards") as bar:
        for key in bad:
            work.rebuild(key)
            bar.advance(1)
    if manifest.sampling.storage.embeddings == "none":
        drop_embeddings(folder)
    mend_index(folder)
    return bad


def _identity(teacher: TeacherFolder, manifest: Manifest) -> Teacher:
    return teacher.identity(text_length=manifest.teacher.text_length, pooled=manifest.teacher.pooled)


class _Rebuild:
    def __init__(
        self,
        location: Location,
        manifest: Manifest,
        teacher: TeacherFolder,
        device: torch.device,
        batch_size: int | None,
        accept_other_bytes: bool,
    ) -> None:
        self.location, self.folder, self.manifest = location, open_folder(location), manifest
        self.teacher, self.device = teacher, device
        self.batch_size, self.accept = batch_size, accept_other_bytes
        self.records = good_records(self.folder)
        self.planned = planned_shards(manifest)
        self.writer = CacheWriter(self.folder, manifest, list(prompt_table(self.folder, manifest, verify="once")))
        self.backbone: FluxBackbone | None = None

    def rebuild(self, key: tuple[Kind, int]) -> None:
        kind, _ = key
        shard, ours = self.planned[key], self.records.get(key)
        started = time.monotonic()
        made = ours.provenance if ours else {}
        size = self.batch_size or int(made.get("batch_size", DEFAULT_BATCH_SIZE))
        if kind == "embeddings":
            attention = None
            arrays = encode_shard(self.writer, self._loaded_text_encoder(), shard, size)
        else:
            attention = self._attention_of(made)
            self._encode_anew(shard, size)
            cache = Cache(self.folder, self.manifest, self.records, finished=True, verify="always")
            arrays = sample_shard(cache, self._loaded_backbone(attention), shard, size, Silent(), lambda: None)
        files = self.writer.encode(kind, shard, arrays)
        record = self.writer.record_of(
            kind,
            shard,
            files,
            raw_bytes=sum(array.nbytes for array in arrays.values()),
            seconds=time.monotonic() - started,
            provenance=provenance(device=self.device, batch_size=size, attention=attention),
        )
        if ours is not None and ours.files != record.files and not self.accept:
            raise self._other_bytes(ours, record)
        put_shard(self.folder, ours, record, files)

    def _encode_anew(self, shard: ShardRange, batch_size: int) -> None:
        """Put the embeddings of a shard's prompts where a build has them, in a cache that does not keep them."""
        if self.manifest.sampling.storage.embeddings == "stored":
            return
        layout = self.writer.layout
        items = range(shard.first, shard.first + shard.rows)
        needed = {layout.embedding_place(layout.place(item).prompt)[0] for item in items}
        for number in sorted(needed - {key[1] for key in self.records if key[0] == "embeddings"}):
            place = layout.embeddings[number]
            arrays = encode_shard(self.writer, self._loaded_text_encoder(), place, batch_size)
            made = provenance(device=self.device, batch_size=batch_size)
            self.writer.commit("embeddings", place, arrays, seconds=0.0, provenance=made)
        self.records = good_records(self.folder)

    @property
    def _dtype(self) -> torch.dtype:
        return DTYPES[self.manifest.sampling.dtype]

    def _attention_of(self, made: dict[str, Any]) -> str | None:
        """The attention backend that a shard's record names, or torch's own if other bytes are accepted."""
        backend = backend_of_record(str(made.get("attention", RECORDED_NATIVE)))
        try:
            check_attention(backend, self.manifest.teacher.backbone_config, dtype=self._dtype, device=self.device)
        except BadSettings as error:
            if self.accept:
                return NATIVE
            raise DamagedCache(
                f"{self.folder} has shards that were made with attention {backend}, which does not work here: rebuild "
                f"on the machine that made them, take them from a copy with --from, or give --accept-other-bytes"
            ) from error
        return backend

    def _loaded_text_encoder(self) -> TeacherTextEncoder:
        pooled = self.manifest.teacher.pooled
        return TeacherTextEncoder.load(self.teacher, dtype=self._dtype, device=self.device, pooled=pooled)

    def _loaded_backbone(self, attention: str | None) -> FluxBackbone:
        if self.backbone is None:
            self.backbone = FluxBackbone.load(
                self.teacher.path,
                recorded_geometry(self.manifest.sampling),
                text_length=self.manifest.teacher.text_length,
                dtype=self._dtype,
                device=self.device,
            )
        self.backbone.use_attention(attention)
        return self.backbone

    def _other_bytes(self, ours: CommitRecord, record: CommitRecord) -> DamagedCache:
        was, now = ours.provenance, record.provenance
        changed = [f"{name} {was.get(name)} -> {now.get(name)}" for name in now if was.get(name) != now.get(name)]
        return DamagedCache(
            f"{self.folder}: {ours.kind} shard {ours.shard} comes out with other bytes than were recorded "
            f"({', '.join(changed) or 'the same settings'}): nothing was written; rebuild on the machine that made it, "
            f"take it from a copy with --from, or give --accept-other-bytes to record the new ones"
        )

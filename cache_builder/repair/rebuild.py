"""Rebuilds the damaged shards of a cache with the teacher, byte for byte or not at all."""

import time
from typing import Any

import torch

from secondcast.cache_builder.provenance import changes, provenance, recorded_batch_size
from secondcast.cache_builder.sample_stage import sample_shard
from secondcast.cache_builder.teacher_models import TeacherModels, check_recorded_teacher
from secondcast.cache_builder.text_stage import encode_shard
from secondcast.models.attention import NATIVE
from secondcast.models.teacher.folder import TeacherFolder
from secondcast.storage_schemas.embeddings import drop_embeddings
from secondcast.storage_schemas.errors import DamagedCacheError, SettingsError
from secondcast.storage_schemas.io.folders import Location, open_folder
from secondcast.storage_schemas.maintenance.repair import bad_shards, good_records, put_shard, repair_index
from secondcast.storage_schemas.maintenance.verify import planned_shards, verify
from secondcast.storage_schemas.progress import Progress, Silent
from secondcast.storage_schemas.reader import Cache, prompt_table, read_manifest
from secondcast.storage_schemas.schema.commits import CommitRecord, Kind, Records, committed_shards
from secondcast.storage_schemas.schema.layout import ShardRange
from secondcast.storage_schemas.writer import CacheWriter


def rebuild(
    location: Location,
    teacher: TeacherFolder,
    device: torch.device,
    progress: Progress,
    *,
    batch_size: int | None,
    allow_mismatch: bool,
) -> list[tuple[Kind, int]]:
    """Resample and replace every damaged shard; return the rebuilt shards.

    batch_size: None for that of each shard's record.
    Raises DamagedCacheError, leaving the shard unchanged, if the new bytes differ from the recorded ones (another
    device, batch size or library) and mismatches are not allowed.
    """
    folder = open_folder(location)
    manifest = read_manifest(folder)
    check_recorded_teacher(manifest, teacher, str(folder))
    bad = bad_shards(verify(location, progress))
    if not bad:
        return []
    if not manifest.keeps_embeddings:
        drop_embeddings(folder)
    work = _Rebuild(location, TeacherModels(manifest, teacher, device), batch_size, allow_mismatch)
    work.encode_anew(bad)
    with progress.bar("rebuild", total=len(bad), done=0, unit="shards") as bar:
        for key in bad:
            work.rebuild(key)
            bar.advance(1)
    if not manifest.keeps_embeddings:
        drop_embeddings(folder)
    repair_index(folder)
    return bad


class _Rebuild:
    def __init__(
        self, location: Location, networks: TeacherModels, batch_size: int | None, allow_mismatch: bool
    ) -> None:
        self.location, self.folder, self.manifest = location, open_folder(location), networks.manifest
        self.networks, self.batch_size, self.accept = networks, batch_size, allow_mismatch
        self.records = good_records(self.folder)
        self.planned = planned_shards(self.manifest)
        prompts = list(prompt_table(self.folder, self.manifest, verify="once"))
        self.writer = CacheWriter(self.folder, self.manifest, prompts)

    def rebuild(self, key: tuple[Kind, int]) -> None:
        kind, _ = key
        shard, ours = self.planned[key], self.records.get(key)
        started = time.monotonic()
        made = ours.provenance if ours else {}
        size = self.batch_size or recorded_batch_size(made)
        if kind == "embeddings":
            encoder = self.networks.text_encoder()
            how: dict[str, Any] = {"networks": encoder.networks}
            arrays = encode_shard(self.writer, encoder, shard, size)
        else:
            attention = self._attention_of(made)
            backbone = self.networks.backbone(attention)
            how = {
                "attention": attention,
                "attention_kernel": backbone.attention_kernel,
                "quantize": self.manifest.sampling.quantize,
                "networks": [backbone.transformer],
            }
            cache = Cache(self.folder, self.manifest, self.records, finished=True, verify="always")
            arrays = sample_shard(cache, backbone, shard, size, Silent(), lambda: None)
        files = self.writer.encode(kind, shard, arrays)
        record = self.writer.record_of(
            kind,
            shard,
            files,
            raw_bytes=sum(array.nbytes for array in arrays.values()),
            seconds=time.monotonic() - started,
            provenance=provenance(device=self.networks.device, batch_size=size, **how),
        )
        if ours is not None and ours.files != record.files and not self.accept:
            raise self._other_bytes(ours, record)
        if not put_shard(self.folder, ours, record, files):
            # Later trajectory shards read the embeddings just restored.
            self.records = Records({**self.records, key: record}.values(), str(self.folder))

    def encode_anew(self, bad: list[tuple[Kind, int]]) -> None:
        """Restore the embeddings of damaged shards' prompts temporarily, in a cache that does not store them."""
        if self.manifest.keeps_embeddings:
            return
        for key in bad:
            if key[0] == "trajectories":
                ours = self.records.get(key)
                size = self.batch_size or recorded_batch_size(ours.provenance if ours else {})
                self._encode_prompts_of(self.planned[key], size)
        self.records = good_records(self.folder)

    def _encode_prompts_of(self, shard: ShardRange, batch_size: int) -> None:
        layout = self.writer.layout
        there = committed_shards(self.folder, "embeddings")
        for number in sorted(layout.embedding_shards_of(shard) - there):
            place = layout.embeddings[number]
            encoder = self.networks.text_encoder()
            arrays = encode_shard(self.writer, encoder, place, batch_size)
            made = provenance(device=self.networks.device, batch_size=batch_size, networks=encoder.networks)
            self.writer.commit("embeddings", place, arrays, seconds=0.0, provenance=made)

    def _attention_of(self, made: dict[str, Any]) -> str | None:
        """The attention backend that a shard's record names, or torch's own if mismatches are allowed."""
        try:
            return self.networks.recorded_backend(made)
        except SettingsError as error:
            if self.accept:
                return NATIVE
            raise DamagedCacheError(
                f"{self.folder} has shards made with attention {made['attention']}, which does not work here: "
                f"rebuild on the machine that made them, restore them from a copy with --from, or give "
                f"--allow-mismatch"
            ) from error

    def _other_bytes(self, ours: CommitRecord, record: CommitRecord) -> DamagedCacheError:
        changed = changes(ours.provenance, record.provenance, on_gpu=self.networks.device.type == "cuda")
        return DamagedCacheError(
            f"{self.folder}: rebuilt {ours.kind} shard {ours.shard} differs from the recorded bytes "
            f"({', '.join(changed) or 'the same settings'}): nothing was written; rebuild on the machine that made it, "
            f"restore it from a copy with --from, or record the new bytes with --allow-mismatch"
        )

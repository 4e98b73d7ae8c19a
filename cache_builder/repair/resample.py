"""Recomputes some trajectories of a cache with the teacher, in the batches in which they were recorded."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from secondcast.cache_builder.provenance import changes, provenance, recorded_batch_size
from secondcast.cache_builder.sample_stage import sample_shard
from secondcast.cache_builder.teacher_models import TeacherModels, check_recorded_teacher
from secondcast.cache_builder.text_stage import encode_prompts
from secondcast.models.attention import NATIVE
from secondcast.models.teacher.folder import TeacherFolder
from secondcast.storage_schemas.codecs.by_field import as_read
from secondcast.storage_schemas.errors import NotInCacheError, SettingsError
from secondcast.storage_schemas.io.folders import Location
from secondcast.storage_schemas.maintenance.rewrite import COPIED_FROM
from secondcast.storage_schemas.progress import Progress
from secondcast.storage_schemas.reader import Cache
from secondcast.storage_schemas.record import Trajectory
from secondcast.storage_schemas.schema.fields import Array, Arrays, fields_of, same_bits
from secondcast.storage_schemas.schema.layout import ShardRange


@dataclass(frozen=True, kw_only=True)
class Recomputed:
    """Comparison of a resampled trajectory with the cache; errors are norm of difference / norm.

    velocity_errors: one per step.
    embedding_error, pooled_error: None if the cache does not have the embedding, or CLIP's pooled vector.
    bit_equal: whether all recorded arrays are bit-equal.
    differs: changes of the provenance, such as "threads 4 -> 1".
    """

    index: int
    key: str
    bit_equal: bool
    velocity_errors: tuple[float, ...]
    embedding_error: float | None
    pooled_error: float | None
    differs: tuple[str, ...]

    @property
    def is_fault(self) -> bool:
        """Whether the bits differ without a change of provenance that explains it."""
        return not (self.bit_equal or self.differs)

    def json_value(self) -> dict[str, Any]:
        """The record as plain JSON types."""
        return asdict(self)


def recompute(
    location: Location, teacher: TeacherFolder, device: torch.device, progress: Progress, *, count: int, seed: int
) -> list[Recomputed]:
    """Recompute `count` of the committed trajectories (all, if there are fewer), drawn by `seed`, in their order.

    The backbone receives the recorded embeddings, or recomputed ones if the cache does not store them, and uses the
    recorded attention backend if it works here. Text encoder and backbone are loaded one at a time.
    Raises SettingsMismatchError for another teacher, NotInCacheError if nothing is committed yet, DamagedCacheError.
    """
    cache = _EmbeddingCache.open(location)
    cache.require_trajectories("resampling")
    manifest = cache.manifest
    check_recorded_teacher(manifest, teacher, str(cache.folder))
    indices = cache.indices()
    if not len(indices):
        raise NotInCacheError(f"{cache.folder} has no trajectory to recompute yet: run the build command first")
    drawn = sorted(np.random.default_rng(seed).choice(indices, size=min(count, len(indices)), replace=False).tolist())
    work = _Recompute(cache, TeacherModels(manifest, teacher, device), progress)
    work.make_embeddings(drawn)
    return work.trajectories(drawn)


class _EmbeddingCache(Cache):
    """A cache whose missing embeddings are replaced by recomputed ones."""

    made: dict[int, Arrays]

    def holds_embedding(self, prompt: int) -> bool:
        return ("embeddings", self.layout.embedding_place(prompt)[0]) in self.records

    def embedding(self, prompt: int) -> Array:
        return super().embedding(prompt) if self.holds_embedding(prompt) else self.made[prompt]["encoder_hidden_states"]


class _Recompute:
    def __init__(self, cache: _EmbeddingCache, networks: TeacherModels, progress: Progress) -> None:
        self.cache, self.networks, self.progress = cache, networks, progress

    def make_embeddings(self, drawn: list[int]) -> None:
        """Recompute the embeddings of the drawn trajectories, and those missing in the cache for their batches."""
        batches, teacher = self._text_batches(drawn), self.cache.manifest.teacher
        encoder = self.networks.text_encoder()
        self.cache.made = {}
        total = sum(len(batch) for batch in batches)
        with self.progress.bar("text", total=total, done=0, unit="prompts") as bar:
            for batch, prompts in batches.items():
                of_batch = [self.cache.prompts[prompt] for prompt in batch]
                arrays = encode_prompts(encoder, teacher, of_batch, len(batch))
                for prompt in prompts:
                    self.cache.made[prompt] = {name: array[prompt - batch[0]].copy() for name, array in arrays.items()}
                bar.advance(len(batch))

    def trajectories(self, drawn: list[int]) -> list[Recomputed]:
        """Sample the batches of the drawn trajectories and compare."""
        batches = self._batches(drawn)
        found = []
        with self.progress.bar("recompute", total=sum(map(len, batches)), done=0, unit="trajectories") as bar:
            for batch in batches:
                shard = self._shard(batch[0])
                backbone = self.networks.backbone(self._attention(batch[0]))
                part = ShardRange(shard=shard.shard, segment=shard.segment, first=batch[0], rows=len(batch))
                arrays = sample_shard(self.cache, backbone, part, len(batch), bar, lambda: None)
                for index in (index for index in drawn if index in batch):
                    row = {name: array[index - batch[0]][None] for name, array in arrays.items()}
                    found.append(self._compared(index, row))
        return found

    def _compared(self, index: int, row: Arrays) -> Recomputed:
        recorded = self.cache.trajectory(index)
        there = _arrays_of(recorded)
        codec = self.cache.manifest.sampling.storage.compression
        fields = fields_of(self.cache.manifest, "trajectories")
        made = {field.name: as_read(field, codec, row[field.name])[0] for field in fields}
        equal = all(same_bits(np.asarray(there[name]), np.asarray(made[name])) for name in made)
        text_errors: dict[str, float] = {}
        if self.cache.holds_embedding(recorded.prompt):
            for name, theirs in self.cache.text_row(recorded.prompt).items():
                ours = self.cache.made[recorded.prompt][name]
                text_errors[name] = _relative_error(ours, theirs)
                equal &= same_bits(ours, theirs)
        steps = zip(made["velocity"], recorded.velocity_KSC, strict=True)
        return Recomputed(
            index=index,
            key=recorded.key,
            bit_equal=equal,
            velocity_errors=tuple(_relative_error(ours, theirs) for ours, theirs in steps),
            embedding_error=text_errors.get("encoder_hidden_states"),
            pooled_error=text_errors.get("pooled_projections"),
            differs=self._differs(recorded),
        )

    def _differs(self, recorded: Trajectory) -> tuple[str, ...]:
        layout, device = self.cache.layout, self.networks.device
        how: dict[str, Any] = {
            "attention": self._attention(recorded.index),
            "quantize": self.cache.manifest.sampling.quantize,
        }
        records = [(self._made(recorded.index), how)]
        if self.cache.holds_embedding(recorded.prompt):
            record = self.cache.records["embeddings", layout.embedding_place(recorded.prompt)[0]]
            records.append((record.provenance, {}))
        lines = []
        for was, how in records:
            now = provenance(device=device, batch_size=recorded_batch_size(was), **how)
            lines += changes(was, now, on_gpu=device.type == "cuda")
            if COPIED_FROM in was:
                lines.append("copied from another cache, possibly with other batches")
        if not self.cache.holds_embedding(recorded.prompt) and len(self._all_batch_sizes) > 1:
            lines.append(f"embeddings not stored, and shards of batch sizes {self._all_batch_sizes}: theirs is unknown")
        return tuple(dict.fromkeys(lines))

    @cached_property
    def _all_batch_sizes(self) -> list[int]:
        return sorted({recorded_batch_size(record.provenance) for record in self.cache.records.values()})

    def _batches(self, drawn: Iterable[int]) -> list[range]:
        """The recorded batches with these trajectories, each once."""
        return list(dict.fromkeys(_batch(index, self._shard(index), self._batch_size(index)) for index in drawn))

    def _text_batches(self, drawn: Iterable[int]) -> dict[range, set[int]]:
        """The recorded batches of the prompts whose embeddings are needed, and which of these prompts each has."""
        layout, batches = self.cache.layout, dict[range, set[int]]()
        for index in drawn:
            prompts = {layout.place(index).prompt}
            for other in _batch(index, self._shard(index), self._batch_size(index)):
                if not self.cache.holds_embedding(prompt := layout.place(other).prompt):
                    prompts.add(prompt)
            for prompt in prompts:
                shard = layout.embeddings[layout.embedding_place(prompt)[0]]
                record = self.cache.records.get(("embeddings", shard.shard))
                # Without a record, assume that the text batches had the size of the trajectories' batches.
                size = self._batch_size(index) if record is None else recorded_batch_size(record.provenance)
                batches.setdefault(_batch(prompt, shard, size), set()).add(prompt)
        return batches

    def _shard(self, index: int) -> ShardRange:
        shard: ShardRange = self.cache.layout.trajectories[self.cache.layout.place(index).shard]
        return shard

    def _made(self, index: int) -> dict[str, Any]:
        """The provenance of a trajectory's shard."""
        return self.cache.records["trajectories", self._shard(index).shard].provenance

    def _attention(self, index: int) -> str | None:
        """The backend of a trajectory's record, or torch's own, with a message, if that does not work."""
        try:
            return self.networks.recorded_backend(self._made(index))
        except SettingsError:
            return NATIVE

    def _batch_size(self, index: int) -> int:
        return recorded_batch_size(self._made(index))


def _batch(item: int, shard: ShardRange, size: int) -> range:
    first = item - (item - shard.first) % size
    return range(first, min(first + size, shard.first + shard.rows))


def _arrays_of(recorded: Trajectory) -> dict[str, Any]:
    """The values read from the cache, by field name."""
    return {
        "velocity": recorded.velocity_KSC,
        "hidden_states": recorded.hidden_states_KSC,
        "noise": recorded.noise_SC,
        "final_latent": recorded.final_latent_SC,
        "guidance": np.float32(0.0 if recorded.guidance is None else recorded.guidance),
    }


def _relative_error(ours: Array, theirs: Array) -> float:
    norm = float(np.linalg.norm(theirs.astype(np.float64)))
    difference = float(np.linalg.norm(ours.astype(np.float64) - theirs.astype(np.float64)))
    return difference / norm if norm else difference

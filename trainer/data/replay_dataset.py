"""Batches from caches: selected steps of selected trajectories, prefetched, with a bounded cache of decoded ones."""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import accumulate
from typing import Any, TypeVar

import numpy as np
import torch

from secondcast.models.families.encoders.interface import Conditioning
from secondcast.models.families.family import POOLED
from secondcast.models.memory.host_modulation import HostModulation
from secondcast.models.recorded_backbone import recorded_schedule
from secondcast.models.student.tokens import StudentTokens
from secondcast.storage_schemas.reader import Cache
from secondcast.storage_schemas.record import Trajectory, trajectory_key
from secondcast.storage_schemas.schema.fields import DTYPES, Array, Arrays
from secondcast.storage_schemas.schema.manifest import Manifest
from secondcast.storage_schemas.tensors import stacked, to_torch
from secondcast.trainer.data.lru_cache import AHEAD_PART, POOL_BYTES, LRUCache
from secondcast.trainer.data.prefetch import Prefetch, Task
from secondcast.trainer.data.sampler import Row

AHEAD = 16
READERS = 4
# This fraction of the pool's bytes holds pooled vectors of 330,000 FLUX prompts, and CLIP's rows of 1,700 SD3 prompts.
CONDITIONING_PART = 4

Rows = Sequence[Row]
Key = tuple[int, int]
"""Index of a source, and of a trajectory or a prompt in it."""


@dataclass(frozen=True, kw_only=True)
class BatchSpec:
    """A batch to read: rows (position, k), for a loss that replays or for an embedding loss (which ignores k).

    timesteps_per_sample: number of consecutive rows that are steps of one trajectory.
    embeddings: whether a replay batch includes the teacher's embeddings.
    """

    replays: bool
    rows: Rows
    timesteps_per_sample: int = 1
    embeddings: bool = False


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows for a loss that replays: latent, target, conditions, step number k, and their text.

    source: index of one of their caches; all have the same sampling settings.
    timesteps_per_sample: number of rows per row of text.
    encoder_hidden_states_BTD: None unless requested.
    modulation_BM: M modulation values in the backbone's dtype, computed from the conditions; None
        if the backbone computes them.
    """

    source: int
    token_ids_BT: torch.Tensor
    hidden_states_BSC: torch.Tensor
    velocity_BSC: torch.Tensor
    conditioning: Conditioning
    timestep_B: torch.Tensor
    guidance_B: torch.Tensor | None
    step_B: torch.Tensor
    timesteps_per_sample: int = 1
    encoder_hidden_states_BTD: torch.Tensor | None = None
    modulation_BM: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class EmbeddingBatch:
    """Token ids of prompts and the teacher's embeddings."""

    token_ids_BT: torch.Tensor
    encoder_hidden_states_BTD: torch.Tensor


AnyBatch = TypeVar("AnyBatch", bound=Batch | EmbeddingBatch)


@dataclass(frozen=True, kw_only=True)
class Source:
    """A cache and the indices of the trajectories (in a text cache, prompts) that positions refer to."""

    cache: Cache
    indices: Array

    @property
    def steps(self) -> int:
        """Number of steps of a row; 1 in a text cache."""
        manifest = self.cache.manifest
        return 1 if manifest.is_text else manifest.sampling.steps


class ReplayDataset:
    """Reads batches of caches for one device. Positions enumerate the rows of all sources in order.

    Rows are trajectories; in a text cache, prompts. The rows of a replay batch come from sources with equal sampling
    settings. All methods are thread-safe.

    pool_bytes: limit for decoded trajectories, again for embeddings, and a sixteenth of it for conditioning; each
        reader thread holds one more value.
    tokens: tokenizer of a student that does not read the caches' token ids.
    host_modulation: computes the modulation vectors of replay batches as they are read.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        device: torch.device,
        pool_bytes: int = POOL_BYTES,
        tokens: StudentTokens | None = None,
        host_modulation: HostModulation | None = None,
    ) -> None:
        self._host_modulation = host_modulation
        self.sources, self._device, self._pool_bytes, self._tokens = sources, device, pool_bytes, tokens
        self._ends = list(accumulate(len(source.indices) for source in sources))
        self._trajectories: LRUCache[Key, Trajectory] = LRUCache(pool_bytes)
        self._embeddings: LRUCache[Key, Array] = LRUCache(pool_bytes)
        self._conditioning: LRUCache[Key, Arrays] = LRUCache(pool_bytes // CONDITIONING_PART)

    def __len__(self) -> int:
        return self._ends[-1]

    def first_of(self, source: int) -> int:
        """The first position of a source."""
        return self._ends[source] - len(self.sources[source].indices)

    def trajectory_of(self, position: int) -> Key:
        """Index of the source, and of the trajectory (in a text cache, prompt) in its cache."""
        source = bisect_right(self._ends, position)
        return source, int(self.sources[source].indices[position - self.first_of(source)])

    def prompt_of(self, position: int) -> Key:
        """Index of the source, and of the row's prompt in its cache."""
        source, index = self.trajectory_of(position)
        cache = self.sources[source].cache
        return source, index if cache.manifest.is_text else cache.layout.place(index).prompt

    @contextmanager
    def prefetch(self, requests: Iterable[BatchSpec]) -> Iterator[Iterator[Batch | EmbeddingBatch]]:
        """The batches of `requests` in order, bit for bit those of `replay_batch` and `embedding_batch`.

        Threads prefetch them. An error (DamagedCacheError, NotInCacheError) is raised where its batch is requested.
        """
        tasks = (
            Task(run=partial(self._read, request, turn), size_bytes=self._size_bytes(request))
            for turn, request in enumerate(requests)
        )
        ahead_bytes = self._pool_bytes // AHEAD_PART
        with Prefetch(tasks, readers=READERS, ahead=AHEAD, ahead_bytes=ahead_bytes) as batches:
            yield (self._on_device(batch) for batch in batches)

    def replay_batch(self, rows: Rows, *, embeddings: bool = False) -> Batch:
        """Rows (position, k) as tensors of the cache's dtype on the device, with the teacher's embeddings if asked."""
        return self._on_device(self._read_replay(rows, embeddings=embeddings))

    def embedding_batch(self, positions: Sequence[int]) -> EmbeddingBatch:
        """Token ids and the teacher's embeddings of the prompts of rows, on the device."""
        return self._on_device(self._read_embeddings(positions))

    def teacher_embeddings(self, prompts: Sequence[Key]) -> torch.Tensor:
        """encoder_hidden_states_BTD of prompts, as cached."""
        return to_torch(self._embeddings_of(prompts)).to(self._device)

    def token_ids(self, prompts: Sequence[Key]) -> torch.Tensor:
        """token_ids_BT of prompts, as the student reads them, on the device."""
        return self._token_ids(prompts).to(self._device)

    def name_of(self, position: int) -> str:
        """Key of a trajectory; of a text cache's prompt its id."""
        source, index = self.trajectory_of(position)
        cache = self.sources[source].cache
        if cache.manifest.is_text:
            return cache.prompts[index].id
        place = cache.layout.place(index)
        return trajectory_key(cache.prompts[place.prompt].id, place.sample_index)

    def _read(self, request: BatchSpec, turn: int) -> Batch | EmbeddingBatch:
        batch: Batch | EmbeddingBatch
        if request.replays:
            batch = self._read_replay(
                request.rows, turn, timesteps_per_sample=request.timesteps_per_sample, embeddings=request.embeddings
            )
        else:
            batch = self._read_embeddings([position for position, _ in request.rows], turn)
        # The copy from pinned memory to the GPU overlaps with computation; on a CPU pinning costs a copy.
        return _each_tensor(batch, torch.Tensor.pin_memory) if self._device.type == "cuda" else batch

    def _read_replay(
        self, rows: Rows, turn: int = 0, *, timesteps_per_sample: int = 1, embeddings: bool = False
    ) -> Batch:
        source = self.trajectory_of(rows[0][0])[0]
        sampling = self._manifest(source).sampling
        shape = (len(rows), sampling.image_tokens, sampling.channels)
        hidden_states_BSC, velocity_BSC = (np.empty(shape, dtype=DTYPES[sampling.dtype]) for _ in range(2))
        guidance_B = np.empty(len(rows), dtype=np.float32)
        for row in _visiting_order(len(rows), turn):
            position, k = rows[row]
            trajectory = self._trajectories.get(self.trajectory_of(position), self._read_trajectory)
            hidden_states_BSC[row] = trajectory.hidden_states_KSC[k]
            velocity_BSC[row] = trajectory.velocity_KSC[k]
            guidance_B[row] = trajectory.guidance if trajectory.guidance is not None else np.nan
        schedule = recorded_schedule(self._manifest(source))
        prompts = [self.prompt_of(position) for position, _ in rows]
        texts = prompts[::timesteps_per_sample]
        batch = Batch(
            source=source,
            token_ids_BT=self._token_ids(texts),
            hidden_states_BSC=to_torch(hidden_states_BSC),
            velocity_BSC=to_torch(velocity_BSC),
            conditioning=stacked([self._conditioning.get(prompt, self._read_conditioning) for prompt in prompts]),
            timestep_B=torch.tensor([schedule.timesteps[k] for _, k in rows], dtype=schedule.timestep_dtype),
            guidance_B=None if sampling.guidance is None else torch.from_numpy(guidance_B),
            step_B=torch.tensor([k for _, k in rows]),
            timesteps_per_sample=timesteps_per_sample,
            encoder_hidden_states_BTD=to_torch(self._embeddings_of(texts, turn)) if embeddings else None,
        )
        return self._with_modulation(batch)

    def _with_modulation(self, batch: Batch) -> Batch:
        if self._host_modulation is None:
            return batch
        modulation_BM = self._host_modulation.rows(batch.timestep_B, batch.guidance_B, batch.conditioning[POOLED])
        return replace(batch, modulation_BM=modulation_BM)

    def _read_embeddings(self, positions: Sequence[int], turn: int = 0) -> EmbeddingBatch:
        prompts = [self.prompt_of(position) for position in positions]
        return EmbeddingBatch(
            token_ids_BT=self._token_ids(prompts),
            encoder_hidden_states_BTD=to_torch(self._embeddings_of(prompts, turn)),
        )

    def _embeddings_of(self, prompts: Sequence[Key], turn: int = 0) -> Array:
        manifest = self._manifest(prompts[0][0])
        shape = (len(prompts), manifest.teacher.text_length, manifest.teacher.text_width)
        embeddings_BTD = np.empty(shape, dtype=DTYPES[manifest.dtype])
        for row in _visiting_order(len(prompts), turn):
            embeddings_BTD[row] = self._embeddings.get(prompts[row], self._read_embedding)
        return embeddings_BTD

    def _manifest(self, source: int) -> Manifest:
        return self.sources[source].cache.manifest

    def _read_trajectory(self, key: Key) -> tuple[Trajectory, int]:
        source, index = key
        trajectory = self.sources[source].cache.trajectory(index)
        return trajectory, trajectory.hidden_states_KSC.nbytes + trajectory.velocity_KSC.nbytes

    def _read_embedding(self, key: Key) -> tuple[Array, int]:
        source, prompt = key
        embedding = self.sources[source].cache.embedding(prompt)
        return embedding, embedding.nbytes

    def _read_conditioning(self, key: Key) -> tuple[Arrays, int]:
        source, prompt = key
        arrays = self.sources[source].cache.conditioning(prompt)
        return arrays, sum(array.nbytes for array in arrays.values())

    def _token_ids(self, keys: Sequence[Key]) -> torch.Tensor:
        prompts = [(self.sources[source].cache, prompt) for source, prompt in keys]
        if self._tokens is not None:
            return self._tokens.batch([cache.prompts[prompt].text for cache, prompt in prompts])
        return torch.from_numpy(np.stack([cache.padded_token_ids(prompt) for cache, prompt in prompts]))

    def _size_bytes(self, request: BatchSpec) -> int:
        manifest = self._manifest(self.trajectory_of(request.rows[0][0])[0])
        teacher, rows = manifest.teacher, len(request.rows)
        embedding, itemsize = teacher.text_length * teacher.text_width, DTYPES[manifest.dtype].itemsize
        if not request.replays:
            return rows * embedding * itemsize
        elements = rows * 2 * manifest.sampling.image_tokens * manifest.sampling.channels
        elements += rows // request.timesteps_per_sample * embedding if request.embeddings else 0
        size_bytes = elements * itemsize
        if self._host_modulation is not None:
            size_bytes += rows * self._host_modulation.row_bytes
        return size_bytes

    def _on_device(self, batch: AnyBatch) -> AnyBatch:
        beside = self._device.type == "cuda"
        return _each_tensor(batch, lambda tensor: tensor.to(self._device, non_blocking=beside))


def _each_tensor(batch: AnyBatch, change: Callable[[torch.Tensor], torch.Tensor]) -> AnyBatch:
    changed: dict[str, Any] = {}
    for field in fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, torch.Tensor):
            changed[field.name] = change(value)
        elif isinstance(value, Mapping):
            changed[field.name] = {name: change(rows) for name, rows in value.items()}
    return replace(batch, **changed)


def _visiting_order(count: int, turn: int) -> Iterator[int]:
    # Consecutive batches may share trajectories, so each reader starts at a different row.
    first = turn % READERS * count // READERS
    return ((first + row) % count for row in range(count))

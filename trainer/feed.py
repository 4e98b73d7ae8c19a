"""From a cache to batches: chosen steps of chosen trajectories, with a bounded pool of decoded ones."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch

from storage_schemas.fields import Array
from storage_schemas.reader import Cache
from storage_schemas.tensors import to_torch
from storage_schemas.trajectory import Trajectory

POOL_BYTES = 2 * 2**30
Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows of replay: latent, target, conditions, and the text that belongs to them."""

    token_ids_BT: torch.Tensor
    hidden_states_BSC: torch.Tensor
    velocity_BSC: torch.Tensor
    timestep_B: torch.Tensor
    guidance_B: torch.Tensor | None


class Feed:
    """Reads batches of a cache for one device. `indices`: numbers of the trajectories that positions count."""

    def __init__(self, cache: Cache, indices: Array, *, device: torch.device, pool_bytes: int = POOL_BYTES) -> None:
        self.cache, self.indices, self._device = cache, indices, device
        self._trajectories: _Pool[Trajectory] = _Pool(pool_bytes)
        self._embeddings: _Pool[Array] = _Pool(pool_bytes)

    def __len__(self) -> int:
        return len(self.indices)

    def replay_batch(self, rows: Sequence[tuple[int, int]]) -> Batch:
        """Rows (position, k) as tensors of the cache's dtype on the device."""
        trajectories = [self._trajectory(position) for position, _ in rows]
        steps = [k for _, k in rows]
        timesteps = self.cache.manifest.sampling.timesteps
        hidden_states = np.stack([t.hidden_states_KSC[k] for t, k in zip(trajectories, steps, strict=True)])
        velocity = np.stack([t.velocity_KSC[k] for t, k in zip(trajectories, steps, strict=True)])
        hidden_states_BSC = to_torch(hidden_states).to(self._device)
        guidance = [t.guidance for t in trajectories]
        return Batch(
            token_ids_BT=self._token_ids([t.prompt for t in trajectories]),
            hidden_states_BSC=hidden_states_BSC,
            velocity_BSC=to_torch(velocity).to(self._device),
            timestep_B=torch.tensor([timesteps[k] for k in steps], dtype=hidden_states_BSC.dtype, device=self._device),
            guidance_B=None
            if guidance[0] is None
            else torch.tensor(guidance, dtype=torch.float32, device=self._device),
        )

    def embedding_batch(self, positions: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """token_ids_BT and the teacher's encoder_hidden_states_BTD of the prompts of trajectories."""
        prompts = [self.cache.layout.place(int(self.indices[position])).prompt for position in positions]
        return self._token_ids(prompts), self.teacher_embeddings(prompts)

    def teacher_embeddings(self, prompts: Sequence[int]) -> torch.Tensor:
        """encoder_hidden_states_BTD of prompts, as cached."""
        parts = [self._embeddings.get(prompt, self._read_embedding) for prompt in prompts]
        return to_torch(np.stack(parts)).to(self._device)

    def prompt_of(self, position: int) -> int:
        """Number of the prompt of a trajectory."""
        return self.cache.layout.place(int(self.indices[position])).prompt

    def _trajectory(self, position: int) -> Trajectory:
        return self._trajectories.get(int(self.indices[position]), self._read_trajectory)

    def _read_trajectory(self, index: int) -> tuple[Trajectory, int]:
        trajectory = self.cache.trajectory(index)
        return trajectory, trajectory.hidden_states_KSC.nbytes + trajectory.velocity_KSC.nbytes

    def _read_embedding(self, prompt: int) -> tuple[Array, int]:
        embedding = self.cache.embedding(prompt)
        return embedding, embedding.nbytes

    def _token_ids(self, prompts: Sequence[int]) -> torch.Tensor:
        ids = np.stack([self.cache.padded_token_ids(prompt) for prompt in prompts])
        return torch.from_numpy(ids).to(self._device)


class _Pool(Generic[Value]):
    """The most recently used values, up to a number of bytes."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit, self._held = limit_bytes, 0
        self._values: OrderedDict[int, tuple[Value, int]] = OrderedDict()

    def get(self, key: int, read: Callable[[int], tuple[Value, int]]) -> Value:
        """The value of a key, read (with its size in bytes) if it is not held."""
        if key not in self._values:
            self._values[key] = read(key)
            self._held += self._values[key][1]
        self._values.move_to_end(key)
        while self._held > self._limit and len(self._values) > 1:
            self._held -= self._values.popitem(last=False)[1][1]
        return self._values[key][0]

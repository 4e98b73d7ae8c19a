"""Inputs for replaying a cache: embeddings by prompt number, and batches of its conditions."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
import torch

from secondcast.evaluation.text_encoder import student_digest
from secondcast.models.backbone import Backbone
from secondcast.models.families.encoders.interface import Conditioning
from secondcast.models.student.folder import student_folder
from secondcast.models.student.pieces import check_same_pieces
from secondcast.models.student.student import Student, check_fits, load_student, untrained_like, vocabulary
from secondcast.models.student.tokens import StudentTokens, own_tokens
from secondcast.storage_schemas.errors import StudentError
from secondcast.storage_schemas.reader import Cache
from secondcast.storage_schemas.record import Trajectory
from secondcast.storage_schemas.tensors import stacked, to_torch

EmbedPrompts = Callable[[Sequence[int]], torch.Tensor]
"""Prompt numbers of a cache -> encoder_hidden_states_BTD."""

# Consecutive rows are steps of one trajectory, so few prompts are needed at a time.
_REMEMBERED_PROMPTS = 16
Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class CacheStudent:
    """A student that embeds the prompts of a cache by number, in fp32; `digest`: see student_digest."""

    network: Student
    tokens: StudentTokens | None
    cache: Cache
    digest: str

    @classmethod
    def open(cls, student: Path, cache: Cache, device: torch.device) -> Self:
        """Load the student of a run folder or an export; StudentError unless it matches the cache."""
        folder = student_folder(student)
        network = load_student(folder)
        tokens = own_tokens(folder, network)
        _check_fits(network, tokens, cache, str(student))
        if tokens is None:
            check_same_pieces(str(folder), cache.tokenizer_files, fix="evaluate it on a cache of its own teacher")
        return cls(
            network=network.to(device),
            tokens=tokens,
            cache=cache,
            digest=student_digest(folder),
        )

    def untrained(self, *, seed: int) -> Self:
        """A student of the same shape with random weights."""
        device = next(self.network.parameters()).device
        network = untrained_like(self.network, seed=seed).to(device)
        return type(self)(network=network, tokens=self.tokens, cache=self.cache, digest="")

    @torch.no_grad()
    def embeddings(self, prompts: Sequence[int]) -> torch.Tensor:
        """encoder_hidden_states_BTD of prompts."""
        if self.tokens is not None:
            ids_BT = self.tokens.batch([self.cache.prompts[prompt].text for prompt in prompts])
        else:
            ids_BT = torch.from_numpy(np.stack([self.cache.padded_token_ids(prompt) for prompt in prompts]))
        embedding_BTD: torch.Tensor = self.network(ids_BT.to(next(self.network.parameters()).device))[0]
        return embedding_BTD


def _check_fits(network: Student, tokens: StudentTokens | None, cache: Cache, where: str) -> None:
    teacher = cache.manifest.teacher
    check_fits(network, teacher.text_width, where, layers=teacher.text_layers, masked=teacher.text_mask is not None)
    own, taught = int(network.config.text_length), teacher.text_length
    # A student with its own tokenizer may have positions for fewer tokens than the teacher.
    if own > taught or (own < taught and tokens is None):
        raise StudentError(
            f"{where} was trained with {own} text tokens, the prompts of {cache.folder} have {taught}: evaluate it on "
            f"a cache with its text length, such as its training cache"
        )
    needed = teacher.text_encoder_config["vocab_size"]
    if tokens is None and vocabulary(network) < needed:
        raise StudentError(
            f"{where} has a vocabulary of {vocabulary(network)}, the token ids of {cache.folder} go up to "
            f"{needed - 1}: it was trained with another tokenizer; evaluate it on a cache of its own teacher"
        )


def cached_embeddings(cache: Cache, device: torch.device) -> EmbedPrompts:
    """The teacher's embeddings, from the cache."""
    read = lru_cache(_REMEMBERED_PROMPTS)(cache.embedding)
    return lambda prompts: to_torch(np.stack([read(prompt) for prompt in prompts])).to(device)


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """Inputs of the backbone besides latent, text and timestep; guidance_B in fp32."""

    conditioning: Conditioning
    guidance_B: torch.Tensor | None

    @classmethod
    def of(cls, cache: Cache, trajectories: Sequence[Trajectory], backbone: Backbone) -> Self:
        """The recorded conditions of these trajectories, on the backbone's device."""
        rows = stacked([cache.conditioning(trajectory.prompt) for trajectory in trajectories])
        conditioning = {name: row.to(backbone.device) for name, row in rows.items()}
        guidance_B = None
        if cache.manifest.sampling.guidance is not None:
            values = [trajectory.guidance for trajectory in trajectories]
            guidance_B = torch.tensor(values, dtype=torch.float32, device=backbone.device)
        return cls(conditioning=conditioning, guidance_B=guidance_B)


def on_device(arrays: Sequence[Any], device: torch.device) -> torch.Tensor:
    """Stack arrays of a cache into a tensor of the same dtype."""
    return to_torch(np.stack(arrays)).to(device)


def filled_batches(items: Sequence[Item], size: int) -> Iterator[tuple[list[Item], int]]:
    """Batches of exactly `size` items, the last one padded with its own items, each with its unpadded size.

    On a CPU the last bits of a row depend on the batch size, so all batches have the same one.
    """
    for first in range(0, len(items), size):
        batch = list(items[first : first + size])
        yield (batch * -(-size // len(batch)))[:size], len(batch)

"""The sample stage: the teacher's trajectories, shard by shard. A batch never crosses a shard."""

import time
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch

from cache_builder.background_writer import BackgroundWriter
from cache_builder.provenance import provenance
from models.backbone import FluxBackbone
from models.noise import draw_guidance, draw_noise
from models.sampler import sample
from models.schedule import DTYPES, Schedule
from storage_schemas.fields import Arrays, fields_of
from storage_schemas.layout import ShardRange
from storage_schemas.progress import Bar, Progress
from storage_schemas.reader import Cache
from storage_schemas.tensors import from_torch, to_torch
from storage_schemas.writer import CacheWriter


def run_sample_stage(writer: CacheWriter, backbone: FluxBackbone, *, batch_size: int, progress: Progress) -> None:
    """Sample every trajectory shard that is missing and commit it beside; needs all embeddings committed."""
    cache = Cache.open(str(writer.folder))
    missing = writer.missing("trajectories")
    done = len(writer.layout) - sum(shard.rows for shard in missing)
    with (
        BackgroundWriter(writer) as background,
        progress.bar("sample", total=len(writer.layout), done=done, unit="trajectories") as bar,
    ):
        for shard in missing:
            started = time.monotonic()
            background.commit(
                "trajectories",
                shard,
                sample_shard(cache, backbone, shard, batch_size, bar, background.check),
                seconds=time.monotonic() - started,
                provenance=provenance(
                    device=backbone.device, batch_size=batch_size, attention=backbone.attention_backend
                ),
            )


def sample_shard(
    cache: Cache, backbone: FluxBackbone, shard: ShardRange, batch_size: int, bar: Bar, check: Callable[[], None]
) -> Arrays:
    """The arrays of one shard; `check` is called before each batch and may raise."""
    parts = []
    for indices in _batches(shard, batch_size):
        # An earlier shard that could not be committed stops the build here, not a shard later.
        check()
        parts.append(_sample_batch(cache, backbone, indices))
        bar.advance(len(indices))
    names = [field.name for field in fields_of(cache.manifest, "trajectories")]
    return {name: np.concatenate([part[name] for part in parts]) for name in names}


def _batches(shard: ShardRange, batch_size: int) -> Iterator[range]:
    end = shard.first + shard.rows
    for first in range(shard.first, end, batch_size):
        yield range(first, min(first + batch_size, end))


def _sample_batch(cache: Cache, backbone: FluxBackbone, indices: range) -> Arrays:
    sampling = cache.manifest.sampling
    dtype = DTYPES[sampling.dtype]
    places = [cache.layout.place(index) for index in indices]
    draws = [{"seed": sampling.seed, "prompt_id": cache.prompts[p.prompt].id, "replica": p.replica} for p in places]
    noise = np.stack(
        [draw_noise(**draw, image_tokens=sampling.image_tokens, channels=sampling.channels) for draw in draws]
    )
    noise_BSC = torch.from_numpy(noise).to(device=backbone.device, dtype=dtype)
    embedding_BTD = to_torch(np.stack([cache.embedding(place.prompt) for place in places])).to(backbone.device)
    pooled_BP = to_torch(np.stack([cache.pooled(place.prompt) for place in places])).to(backbone.device)
    guidance_B = None
    if sampling.guidance is not None:
        values = [draw_guidance(sampling.guidance, **draw) for draw in draws]
        guidance_B = torch.tensor(values, dtype=torch.float32, device=backbone.device)
    walk = sample(
        partial(_predict, backbone, embedding_BTD, pooled_BP, guidance_B),
        noise_BSC,
        Schedule(sigmas=sampling.sigmas, timesteps=sampling.timesteps),
    )
    arrays = {"velocity": from_torch(walk.velocity_BKSC), "final_latent": from_torch(walk.final_latent_BSC)}
    if sampling.storage.latents == "stored":
        arrays["hidden_states"] = from_torch(walk.hidden_states_BKSC)
    else:
        arrays["noise"] = from_torch(noise_BSC)
    if guidance_B is not None:
        arrays["guidance"] = from_torch(guidance_B)
    return arrays


def _predict(
    backbone: FluxBackbone,
    embedding_BTD: torch.Tensor,
    pooled_BP: torch.Tensor,
    guidance_B: torch.Tensor | None,
    x_BSC: torch.Tensor,
    timestep_B: torch.Tensor,
) -> torch.Tensor:
    return backbone.predict(x_BSC, embedding_BTD, pooled_BP, timestep_B, guidance_B)

"""The sample stage: the teacher's trajectories, shard by shard. A batch never crosses a shard."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from secondcast.cache_builder.pipeline.background_writer import BackgroundWriter
from secondcast.cache_builder.pipeline.encoding import WORTH_BYTES, EncodingProcess
from secondcast.cache_builder.pipeline.host_copies import HostCopies
from secondcast.cache_builder.provenance import provenance
from secondcast.models.backbone import Backbone
from secondcast.models.families.text import Text, recorded_text
from secondcast.models.noise import draw_guidance, draw_noise
from secondcast.models.recorded_backbone import recorded_schedule
from secondcast.models.sampler import Predict, bound, sample
from secondcast.models.schedule import DTYPES
from secondcast.storage_schemas.progress import Bar, Progress, size_text
from secondcast.storage_schemas.reader import Cache
from secondcast.storage_schemas.schema.fields import Arrays, fields_of
from secondcast.storage_schemas.schema.layout import ShardRange
from secondcast.storage_schemas.writer import CacheWriter, Encode

Tensors = dict[str, torch.Tensor]


def run_sample_stage(
    writer: CacheWriter,
    cache: Cache,
    backbone: Backbone,
    shards: Sequence[ShardRange],
    *,
    done: int,
    share: int,
    batch_size: int,
    progress: Progress,
) -> None:
    """Sample these trajectory shards and commit them, with the embeddings that `cache` has of their prompts.

    share, done: trajectories of this worker, and how many of them are committed.

    While the device samples a batch, threads prepare the next one, copy the last one to the host, encode, check and
    write; their queues are bounded, and an error in one of them stops the stage.
    """
    total = sum(shard.rows for shard in shards)
    with progress.bar("sample", total=share, done=done, unit="trajectories") as bar:
        with (
            HostCopies(backbone.device) as copies,
            _encoding(writer, shards) as encode,
            BackgroundWriter(writer, encode=encode) as background,
            _prepared(cache, shards, batch_size) as batches,
        ):
            for shard in shards:
                started = time.monotonic()
                parts = []
                for indices in _batches(shard, batch_size):
                    # An earlier shard that could not be committed stops the build here, not a shard later.
                    background.check()
                    parts.append(copies.copy(_sample_batch(cache, backbone, next(batches))))
                    bar.advance(len(indices), _written(background, total))
                background.commit(
                    "trajectories",
                    shard,
                    partial(_joined, cache, parts),
                    seconds=time.monotonic() - started,
                    provenance=provenance(
                        device=backbone.device,
                        batch_size=batch_size,
                        attention=backbone.attention_backend,
                        attention_kernel=backbone.attention_kernel,
                        modulation=backbone.modulation,
                        quantize=writer.manifest.sampling.quantize,
                        networks=[backbone.transformer],
                    ),
                )
        # The last shards are committed by now.
        bar.advance(0, _written(background, total))


@contextmanager
def _encoding(writer: CacheWriter, shards: Sequence[ShardRange]) -> Iterator[Encode | None]:
    """A process to encode in, where there is enough to encode."""
    row_bytes = sum(field.row_bytes for field in fields_of(writer.manifest, "trajectories"))
    if row_bytes * sum(shard.rows for shard in shards) < WORTH_BYTES:
        yield None
        return
    with EncodingProcess(writer) as process:
        yield process.encode


def _written(background: BackgroundWriter, total: int) -> str:
    if not background.rows:
        return ""
    written = f"{size_text(background.bytes)} written"
    to_come = background.bytes * (total - background.rows) // background.rows
    return f"{written}, {size_text(to_come)} to come" if to_come else written


def _joined(cache: Cache, parts: Iterable[Future[Arrays]]) -> Arrays:
    arrays = [part.result() for part in parts]
    names = [field.name for field in fields_of(cache.manifest, "trajectories")]
    return {name: np.concatenate([array[name] for array in arrays]) for name in names}


def sample_shard(
    cache: Cache, backbone: Backbone, shard: ShardRange, batch_size: int, bar: Bar, check: Callable[[], None]
) -> Arrays:
    """The arrays of one shard, in turn; `check` is called before each batch and may raise."""
    with HostCopies(backbone.device) as copies:
        parts = []
        for indices in _batches(shard, batch_size):
            check()
            parts.append(copies.copy(_sample_batch(cache, backbone, prepare_batch(cache, indices))))
            bar.advance(len(indices))
        return _joined(cache, parts)


@contextmanager
def _prepared(cache: Cache, shards: Sequence[ShardRange], batch_size: int) -> Iterator[Iterator["Start"]]:
    """The starts of all batches in turn, the next one prepared beside the caller."""
    with ThreadPoolExecutor(1, thread_name_prefix="prepare") as pool:
        yield _one_ahead(pool, cache, (indices for shard in shards for indices in _batches(shard, batch_size)))


def _one_ahead(pool: ThreadPoolExecutor, cache: Cache, batches: Iterable[range]) -> Iterator["Start"]:
    ahead: Future[Start] | None = None
    for indices in batches:
        current, ahead = ahead, pool.submit(prepare_batch, cache, indices)
        if current is not None:
            yield current.result()
    if ahead is not None:
        yield ahead.result()


def _batches(shard: ShardRange, batch_size: int) -> Iterator[range]:
    end = shard.first + shard.rows
    for first in range(shard.first, end, batch_size):
        yield range(first, min(first + batch_size, end))


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where the trajectories of a batch begin, on the host: noise in fp32, text, guidance (None: takes none).

    negative: one row; None without classifier-free guidance.
    """

    noise_BSC: torch.Tensor
    text: Text
    guidance_B: torch.Tensor | None
    negative: Text | None


def prepare_batch(cache: Cache, indices: range) -> Start:
    """Noise, guidance and embeddings of these trajectories."""
    sampling = cache.manifest.sampling
    places = [cache.layout.place(index) for index in indices]
    draws = [
        {"seed": sampling.seed, "prompt_id": cache.prompts[p.prompt].id, "sample_index": p.sample_index} for p in places
    ]
    noise = [draw_noise(**draw, image_tokens=sampling.image_tokens, channels=sampling.channels) for draw in draws]
    guidance_B = None
    if sampling.guidance is not None:
        values = [draw_guidance(sampling.guidance, **draw) for draw in draws]
        guidance_B = torch.tensor(values, dtype=torch.float32)
    return Start(
        noise_BSC=torch.from_numpy(np.stack(noise)),
        text=recorded_text(cache, [place.prompt for place in places]),
        guidance_B=guidance_B,
        negative=None if cache.negative is None else recorded_text(cache, [cache.negative]),
    )


def bind_conditions(backbone: Backbone, start: Start) -> Predict:
    """The backbone with text and guidance of a batch bound in."""
    guidance_B = None if start.guidance_B is None else start.guidance_B.to(backbone.device)
    negative = None if start.negative is None else start.negative.on(backbone.device)
    return bound(backbone, start.text.on(backbone.device), guidance_B, negative)


def _sample_batch(cache: Cache, backbone: Backbone, start: Start) -> Tensors:
    sampling = cache.manifest.sampling
    noise_BSC = start.noise_BSC.to(device=backbone.device, dtype=DTYPES[sampling.dtype])
    schedule = recorded_schedule(cache.manifest)
    trajectories = sample(bind_conditions(backbone, start), noise_BSC, schedule)
    tensors = {"velocity": trajectories.velocity_BKSC, "final_latent": trajectories.final_latent_BSC}
    if sampling.storage.latents == "stored":
        tensors["hidden_states"] = trajectories.hidden_states_BKSC
    else:
        tensors["noise"] = noise_BSC
    if start.guidance_B is not None:
        tensors["guidance"] = start.guidance_B
    return tensors

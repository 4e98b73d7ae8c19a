"""Does reading keep up with training, and what does writing cost the sampler? `python -m benchmarks.dataset_speed`.

A synthetic cache of 512 px shapes is written per format. The training step and the GPU's part of sampling are sleeps,
as the host does nothing while a GPU computes; files come from the page cache.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from secondcast.cache_builder.pipeline.background_writer import BackgroundWriter
from secondcast.storage_schemas.reader import Cache
from secondcast.storage_schemas.schema.derivation import derive_latents
from secondcast.storage_schemas.schema.fields import DTYPES, Arrays, fields_of
from secondcast.storage_schemas.schema.layout import ShardRange
from secondcast.storage_schemas.schema.manifest import Manifest, PromptSet, Segment, Teacher
from secondcast.storage_schemas.schema.prompts import Prompt, prompt_id
from secondcast.storage_schemas.schema.recording import Sampling, Storage
from secondcast.storage_schemas.writer import CacheWriter, prompt_set_fields
from secondcast.trainer.data.replay_dataset import BatchSpec, ReplayDataset, Source
from secondcast.trainer.data.sampler import Part, Sampler

STEPS, IMAGE_TOKENS, CHANNELS, TEXT_LENGTH, TEXT_WIDTH = 20, 1024, 64, 77, 4096
FORMATS: tuple[Literal["zarr", "webdataset"], ...] = ("zarr", "webdataset")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-trajectories", type=int, default=24)
    parser.add_argument("--shard-size", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--batches", type=int, default=40)
    parser.add_argument("--step-seconds", type=float, nargs="+", default=[0.0, 0.05, 0.2])
    parser.add_argument("--shard-seconds", type=float, default=2.0, help="simulated sampling of a shard")
    flags = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print("| format | writing | shards | stall per shard, s | after the last shard, s | all, s |")
        print("|---|---|---|---|---|---|")
        for form in FORMATS:
            measure_writing(folder, form, flags)
        print()
        print("| format | pool | step, s | reading | first batch, s | then batches/s | MB/s | consumer waits |")
        print("|---|---|---|---|---|---|---|---|")
        for form in FORMATS:
            for pool, pool_bytes in (("32 MiB", 2**25), ("2 GiB", 2**31)):
                for step_seconds in flags.step_seconds:
                    for ahead in (False, True):
                        measure_reading(folder / form, form, pool, pool_bytes, step_seconds, flags, ahead=ahead)


def measure_writing(folder: Path, form: Literal["zarr", "webdataset"], flags: argparse.Namespace) -> None:
    """Write the cache twice, in turn and beside a simulated sampler; the second one is read afterwards."""
    for writing in ("in turn", "beside"):
        path = folder / (form if writing == "beside" else f"{form}-in-turn")
        writer = new_cache(path, form, flags)
        commit_all(writer, "embeddings")
        shards = writer.missing("trajectories")
        arrays = {shard.shard: made_up(writer.manifest, shard, "trajectories") for shard in shards}
        started = time.monotonic()
        stalls = sample_and_commit(writer, shards, arrays, flags.shard_seconds, beside=writing == "beside")
        whole = time.monotonic() - started
        # The last shard has nothing beside which it could be written.
        last = whole - sum(stalls) - flags.shard_seconds * len(shards) if writing == "beside" else stalls.pop()
        print(f"| {form} | {writing} | {len(shards)} | {np.mean(stalls):.3f} | {last:.2f} | {whole:.2f} |", flush=True)
        writer.finish()


def sample_and_commit(
    writer: CacheWriter, shards: list[ShardRange], arrays: dict[int, Arrays], shard_seconds: float, *, beside: bool
) -> list[float]:
    """Seconds that each shard kept the sampling thread from its next shard."""
    stalls = []

    def one(shard: ShardRange, target: CacheWriter | BackgroundWriter) -> None:
        time.sleep(shard_seconds)
        started = time.monotonic()
        target.commit("trajectories", shard, arrays.pop(shard.shard), seconds=shard_seconds, provenance={})
        stalls.append(time.monotonic() - started)

    if not beside:
        for shard in shards:
            one(shard, writer)
        return stalls
    with BackgroundWriter(writer) as background:
        for shard in shards:
            one(shard, background)
    return stalls


def measure_reading(
    path: Path, form: str, pool: str, pool_bytes: int, step_seconds: float, flags: argparse.Namespace, *, ahead: bool
) -> None:
    """Time `batches` training steps that sleep; the shards' checksums were compared before, once, as in any run."""
    cache = Cache.open(path)
    for shard in cache.layout.trajectories:
        cache.trajectory(shard.first)
    dataset = ReplayDataset(
        [Source(cache=cache, indices=cache.indices())], device=torch.device("cpu"), pool_bytes=pool_bytes
    )
    order = Sampler(
        kind="shuffled", parts=(Part(count=len(dataset)),), steps=STEPS, batch_size=flags.batch_size, seed=0
    )
    requests = [BatchSpec(replays=True, rows=order.batch(n)) for n in range(flags.batches)]
    if ahead:
        with dataset.prefetch(requests) as batches:
            first, waited, seconds = consume(batches, step_seconds)
    else:
        first, waited, seconds = consume((dataset.replay_batch(request.rows) for request in requests), step_seconds)
    row_bytes = 2 * IMAGE_TOKENS * CHANNELS * DTYPES["bfloat16"].itemsize
    rate = flags.batches / seconds
    print(
        f"| {form} | {pool} | {step_seconds:g} | {'ahead' if ahead else 'in turn'} | {first:.2f} | {rate:.1f} | "
        f"{rate * flags.batch_size * row_bytes / 1e6:.1f} | {100 * waited / seconds:.1f} % |",
        flush=True,
    )


def consume(batches: Iterator[Any], step_seconds: float) -> tuple[float, float, float]:
    """Seconds until the first batch; then, with a step after each: seconds waited for the others, and all seconds."""
    started = time.monotonic()
    next(batches)
    begun = time.monotonic()
    waited = 0.0
    while True:
        time.sleep(step_seconds)
        asked = time.monotonic()
        if next(batches, None) is None:
            return begun - started, waited, asked - begun
        waited += time.monotonic() - asked


def new_cache(path: Path, form: Literal["zarr", "webdataset"], flags: argparse.Namespace) -> CacheWriter:
    texts = [f"prompt number {n}" for n in range(flags.num_trajectories)]
    prompts = [Prompt(id=prompt_id(t), text=t, sources=("made-up",), token_ids=(5, 6, 1)) for t in texts]
    sigmas = tuple(float(np.float32(1 - k / STEPS)) for k in range(STEPS + 1))
    manifest = Manifest(
        source="made-up",
        created_by="benchmarks/dataset_speed.py",
        teacher=Teacher(
            family="flux",
            weights={"transformer/a.safetensors": "00"},
            backbone_config={"guidance_embeds": True},
            text_encoder_config={"vocab_size": 10},
            tokenizer={},
            text_length=TEXT_LENGTH,
            text_width=TEXT_WIDTH,
            pad_token_id=0,
            pooled="zero",
            pooled_width=768,
        ),
        sampling=Sampling(
            height=512,
            width=512,
            image_tokens=IMAGE_TOKENS,
            channels=CHANNELS,
            steps=STEPS,
            schedule="diffusers",
            sigmas=sigmas,
            timesteps=sigmas[:-1],
            guidance=(3.5,),
            seed=0,
            noise="philox-float32",
            dtype="bfloat16",
            latent_rule="flow-match-euler",
            storage=Storage(format=form, compression="none", latents="derived"),
        ),
        prompts=PromptSet(
            segments=(
                Segment(
                    first_prompt=0,
                    prompts=len(prompts),
                    first_sample=0,
                    samples_per_prompt=1,
                    shard_size=flags.shard_size,
                ),
            ),
            **prompt_set_fields(prompts),
        ),
        metadata={},
    )
    return CacheWriter.create_or_resume(path, manifest, prompts, {})


def commit_all(writer: CacheWriter, kind: Literal["embeddings", "trajectories"]) -> None:
    for shard in writer.missing(kind):
        writer.commit(kind, shard, made_up(writer.manifest, shard, kind), seconds=0.0, provenance={})


def made_up(manifest: Manifest, shard: ShardRange, kind: Literal["embeddings", "trajectories"]) -> Arrays:
    rng = np.random.default_rng([shard.shard, kind == "trajectories"])
    arrays = {
        field.name: rng.standard_normal((shard.rows, *field.row_shape), dtype=np.float32).astype(field.dtype)
        for field in fields_of(manifest, kind)
    }
    if kind == "trajectories":
        latents = derive_latents(arrays["noise"], arrays["velocity"], manifest.sampling.sigmas)
        arrays["final_latent"] = latents[:, -1]
    return arrays


if __name__ == "__main__":
    main()

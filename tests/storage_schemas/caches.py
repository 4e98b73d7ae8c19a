"""Small caches with made-up numbers, written by the real writer."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from secondcast.storage_schemas.io.folders import Location
from secondcast.storage_schemas.schema.commits import CommitRecord
from secondcast.storage_schemas.schema.derivation import derive_latents
from secondcast.storage_schemas.schema.fields import DTYPES, Array, Arrays, fields_of
from secondcast.storage_schemas.schema.layout import ShardRange
from secondcast.storage_schemas.schema.manifest import Manifest, PromptSet, Segment, Teacher
from secondcast.storage_schemas.schema.prompts import Prompt, prompt_id
from secondcast.storage_schemas.schema.recording import Sampling, Storage
from secondcast.storage_schemas.writer import CacheWriter, prompt_set_fields

STEPS, TOKENS, CHANNELS, TEXT, WIDTH = 3, 4, 2, 5, 6

CLIP = {"pooled_encoder_config": {"hidden_size": 2}, "pooled_tokenizer": {"merges.txt": "00"}}


def some_prompts(count: int) -> list[Prompt]:
    texts = [f"prompt number {i}" for i in range(count)]
    return [
        Prompt(id=prompt_id(t), text=t, sources=("made-up",), token_ids=(5, i % 7 + 2, 1)) for i, t in enumerate(texts)
    ]


def some_manifest(prompts: list[Prompt], **changes: Any) -> Manifest:
    settings: dict[str, Any] = {
        "format": "zarr",
        "latents": "derived",
        "dtype": "bfloat16",
        "seed": 0,
        "samples_per_prompt": 1,
    }
    settings |= {"compression": "none", "embeddings": "stored", "pooled": "zero"}
    settings |= {"shard_size": 4, "guidance": (2.0, 3.5)} | changes
    return Manifest(
        source="made-up",
        created_by="tests",
        teacher=Teacher(
            family="flux",
            weights={"transformer/a.safetensors": "00"},
            backbone_config={"guidance_embeds": True},
            text_encoder_config={"vocab_size": 10},
            tokenizer={},
            text_length=TEXT,
            text_width=WIDTH,
            pad_token_id=0,
            pooled=settings["pooled"],
            pooled_width=2,
            **(CLIP if settings["pooled"] == "clip" else {}),
        ),
        sampling=Sampling(
            height=8,
            width=8,
            image_tokens=TOKENS,
            channels=CHANNELS,
            steps=STEPS,
            schedule="diffusers",
            sigmas=(1.0, 0.75, 0.4, 0.0),
            timesteps=(1.0, 0.75, 0.4),
            guidance=settings["guidance"],
            seed=settings["seed"],
            noise="philox-float32",
            dtype=settings["dtype"],
            latent_rule="flow-match-euler",
            storage=Storage(
                format=settings["format"],
                compression=settings["compression"],
                latents=settings["latents"],
                embeddings=settings["embeddings"],
            ),
        ),
        prompts=PromptSet(
            segments=(
                Segment(
                    first_prompt=0,
                    prompts=len(prompts),
                    first_sample=0,
                    samples_per_prompt=settings["samples_per_prompt"],
                    shard_size=settings["shard_size"],
                ),
            ),
            **prompt_set_fields(prompts),
        ),
        metadata={},
    )


def some_arrays(manifest: Manifest, shard: ShardRange, kind: Any = "trajectories") -> Arrays:
    """Numbers that follow from the shard alone; trajectories derive as the sampler's would."""
    rng = np.random.default_rng([shard.shard, kind == "trajectories"])
    arrays = {
        field.name: rng.standard_normal((shard.rows, *field.row_shape), dtype=np.float32).astype(field.dtype)
        for field in fields_of(manifest, kind)
    }
    if kind == "trajectories":
        noise = rng.standard_normal((shard.rows, TOKENS, CHANNELS), dtype=np.float32)
        noise = noise.astype(DTYPES[manifest.sampling.dtype])
        latents = derive_latents(noise, arrays["velocity"], manifest.sampling.sigmas)
        arrays["final_latent"] = latents[:, -1]
        if "noise" in arrays:
            arrays["noise"] = noise
        else:
            arrays["hidden_states"] = latents[:, :-1]
    return arrays


def begin(location: Location, **changes: Any) -> CacheWriter:
    prompts = some_prompts(6)
    return CacheWriter.create_or_resume(location, some_manifest(prompts, **changes), prompts, {})


def commit(writer: CacheWriter, shard: ShardRange, **changes: Array) -> CommitRecord:
    arrays = some_arrays(writer.manifest, shard) | changes
    return writer.commit("trajectories", shard, arrays, seconds=0, provenance={})


def write_cache(path: Location, *, count: int = 6, **changes: Any) -> CacheWriter:
    prompts = some_prompts(count)
    writer = CacheWriter.create_or_resume(path, some_manifest(prompts, **changes), prompts, {})
    for kind in ("embeddings", "trajectories"):
        for shard in writer.missing(kind):
            arrays = some_arrays(writer.manifest, shard, kind)
            writer.commit(kind, shard, arrays, seconds=1.0, provenance={})
    assert writer.finish()
    return writer


def keyed_arrays(writer: CacheWriter, shard: ShardRange, kind: Any) -> Arrays:
    """Numbers that follow from seed, prompt id and sample, as a teacher's would: the same in any cache."""
    rows = []
    for item in range(shard.first, shard.first + shard.rows):
        place = writer.layout.place(item) if kind == "trajectories" else None
        identity = writer.prompts[place.prompt if place else item].id
        seed = [int(identity[:8], 16), writer.manifest.sampling.seed, place.sample_index if place else 10**6]
        rows.append(_row(writer.manifest, kind, np.random.default_rng(seed)))
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}


def _row(manifest: Manifest, kind: Any, rng: np.random.Generator) -> Arrays:
    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal((1, *shape), dtype=np.float32)

    dtype = DTYPES[manifest.sampling.dtype]
    if kind == "embeddings":
        arrays = {"encoder_hidden_states": draw(TEXT, WIDTH).astype(dtype), "pooled_projections": draw(2).astype(dtype)}
        return {field.name: arrays[field.name] for field in fields_of(manifest, kind)}
    noise, velocity = draw(TOKENS, CHANNELS).astype(dtype), draw(STEPS, TOKENS, CHANNELS).astype(dtype)
    latents = derive_latents(noise, velocity, manifest.sampling.sigmas)
    arrays = {"velocity": velocity, "final_latent": latents[:, -1], "guidance": draw()}
    stored = {"hidden_states": latents[:, :-1]} if manifest.sampling.storage.latents == "stored" else {"noise": noise}
    arrays |= stored
    return {field.name: arrays[field.name] for field in fields_of(manifest, kind)}


def write_keyed_cache(
    path: Path | str,
    prompts: list[Prompt],
    *,
    segments: tuple[Segment, ...] | None = None,
    leave_out: tuple[tuple[str, int], ...] = (),
    tokenizer: dict[str, bytes] | None = None,
    provenance: dict[str, Any] | None = None,
    **changes: Any,
) -> CacheWriter:
    """A cache of keyed arrays; shards in `leave_out` are not committed."""
    tokenizer = tokenizer or {"spiece.model": b"pieces"}
    manifest = some_manifest(prompts, **changes)
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in tokenizer.items()}
    teacher = manifest.teacher.model_copy(update={"tokenizer": hashes})
    manifest = manifest.model_copy(update={"teacher": teacher})
    if segments:
        update = {"prompts": manifest.prompts.model_copy(update={"segments": segments})}
        manifest = manifest.model_copy(update=update)
    writer = CacheWriter.create_or_resume(path, manifest, prompts, tokenizer)
    for kind in ("embeddings", "trajectories"):
        for shard in writer.missing(kind):
            if (kind, shard.shard) not in leave_out:
                arrays = keyed_arrays(writer, shard, kind)
                writer.commit(kind, shard, arrays, seconds=1.0, provenance=provenance or {"device": "made-up"})
    assert writer.finish() == (not leave_out)
    return writer


def data_files(path: Path) -> dict[str, bytes]:
    """All files of a cache but the commit records: only those hold times and provenance."""
    return {
        str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file() and "commits" not in p.parts
    }

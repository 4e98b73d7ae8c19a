"""Invariants 1 to 3 on this device: the recording equals the pipeline's, its latents derive, and it replays."""

from dataclasses import dataclass

import torch

from secondcast.cache_builder.sample_stage import bind_conditions, prepare_batch
from secondcast.models.backbone import Backbone
from secondcast.models.families.reference import ReferencePipeline
from secondcast.models.geometry import recorded_geometry
from secondcast.models.schedule import DTYPES
from secondcast.models.teacher.folder import TeacherFolder
from secondcast.storage_schemas.reader import Cache
from secondcast.storage_schemas.record import Trajectory
from secondcast.storage_schemas.schema.fields import Array, same_bits
from secondcast.storage_schemas.tensors import from_torch, to_torch


@dataclass(frozen=True, kw_only=True)
class EquivalenceCheck:
    """Result of a check: `holds` is None if it was not made; `description` is a one-line description."""

    invariant: int
    holds: bool | None
    description: str


def check_equivalence(
    cache: Cache, backbone: Backbone, teacher: TeacherFolder, indices: range
) -> list[EquivalenceCheck]:
    """Check a batch of committed trajectories; `indices` are one recorded batch of a shard."""
    recorded = [cache.trajectory(index) for index in indices]
    return [
        _equals_pipeline(cache, backbone, teacher, indices, recorded),
        _derives(cache, recorded),
        _replays(cache, backbone, indices, recorded),
    ]


def _equals_pipeline(
    cache: Cache, backbone: Backbone, teacher: TeacherFolder, indices: range, recorded: list[Trajectory]
) -> EquivalenceCheck:
    sampling, pipeline = cache.manifest.sampling, backbone.family.pipeline
    if sampling.schedule != "diffusers":
        return EquivalenceCheck(
            invariant=1, holds=None, description=f"not checked: {pipeline} has no schedule {sampling.schedule!r}"
        )
    # A pipeline call has one guidance scale: compare the rows with the first one, in a batch of the same size.
    guidance = recorded[0].guidance
    start = prepare_batch(cache, indices)
    negative = None if start.negative is None else start.negative.repeated(len(indices))
    with backbone.called_by_a_pipeline():
        latents_BSC = ReferencePipeline(
            teacher.family,
            backbone.transformer,
            scheduler_config=teacher.config("scheduler"),
            vae_config=teacher.config("vae"),
        ).final_latents(
            start.noise_BSC.to(device=backbone.device, dtype=DTYPES[sampling.dtype]),
            start.text.on(backbone.device),
            recorded_geometry(sampling),
            negative=None if negative is None else negative.on(backbone.device),
            guidance=guidance,
            steps=sampling.steps,
        )
    rows = [row for row, trajectory in enumerate(recorded) if trajectory.guidance == guidance]
    pairs = [(recorded[row].final_latent_SC, from_torch(latents_BSC[row])) for row in rows]
    return _check(1, f"final latents are {teacher.family.pipeline}'s, bit for bit", pairs)


def _derives(cache: Cache, recorded: list[Trajectory]) -> EquivalenceCheck:
    if cache.manifest.sampling.storage.latents == "stored":
        return EquivalenceCheck(invariant=2, holds=None, description="not checked: latents are stored")
    # The writer checks every trajectory on the encoded bytes before it commits a shard.
    said = "latents derive from noise and velocity bit for bit in every committed trajectory"
    return EquivalenceCheck(invariant=2, holds=True, description=said)


def _replays(cache: Cache, backbone: Backbone, indices: range, recorded: list[Trajectory]) -> EquivalenceCheck:
    sampling = cache.manifest.sampling
    if sampling.storage.compression == "int8":
        return EquivalenceCheck(
            invariant=3, holds=None, description="not checked: compression int8 rounds the velocity"
        )
    predict, pairs = bind_conditions(backbone, prepare_batch(cache, indices)), []
    with torch.no_grad():
        for k, timestep in enumerate(sampling.timesteps):
            x_BSC = torch.stack([to_torch(t.hidden_states_KSC[k]) for t in recorded]).to(backbone.device)
            timestep_B = torch.full((len(recorded),), timestep, device=backbone.device, dtype=backbone.timestep_dtype)
            velocity_BSC = from_torch(predict(x_BSC, timestep_B)[0])
            pairs += [(t.velocity_KSC[k], velocity_BSC[row]) for row, t in enumerate(recorded)]
    return _check(3, "the recorded embeddings replay to the recorded velocity, bit for bit", pairs)


def _check(invariant: int, said: str, pairs: list[tuple[Array, Array]]) -> EquivalenceCheck:
    """Compare pairs of recorded and recomputed arrays."""
    equal = sum(same_bits(recorded, made) for recorded, made in pairs)
    if equal == len(pairs):
        return EquivalenceCheck(invariant=invariant, holds=True, description=f"{said} ({equal} of {equal})")
    worst = max(_relative_error(recorded, made) for recorded, made in pairs)
    return EquivalenceCheck(
        invariant=invariant,
        holds=False,
        description=f"violated: {said} only in {equal} of {len(pairs)}; largest relative error {worst:.1e}",
    )


def _relative_error(recorded: Array, made: Array) -> float:
    a, b = (to_torch(array).double() for array in (recorded, made))
    return float((a - b).norm() / a.norm())

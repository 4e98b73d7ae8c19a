"""The transformer and the schedule that caches were recorded with, to replay them."""

from collections.abc import Sequence

import torch

from secondcast.models.backbone import Backbone
from secondcast.models.families.registry import family_named
from secondcast.models.geometry import recorded_geometry
from secondcast.models.memory.conditions import recorded_conditions
from secondcast.models.memory.options import MemoryOptions
from secondcast.models.schedule import DTYPES, Schedule
from secondcast.models.teacher.folder import TeacherFolder, check_recorded_transformer
from secondcast.storage_schemas.schema.manifest import Manifest


def recorded_schedule(manifest: Manifest) -> Schedule:
    """The schedule of a cache, with the dtype of its timesteps."""
    sampling = manifest.sampling
    dtype = family_named(manifest.teacher.family).timestep_dtype(DTYPES[sampling.dtype])
    return Schedule(
        sigmas=sampling.sigmas, timesteps=sampling.timesteps, timestep_dtype=dtype, scheduler=sampling.scheduler
    )


def load_recorded_backbone(
    manifests: Sequence[Manifest],
    teacher: TeacherFolder,
    *,
    dtype: torch.dtype,
    batch_rows: int,
    options: MemoryOptions,
    attention_backend: str | None,
    device: torch.device,
    blocks: int | None = None,
) -> Backbone:
    """The transformer of these caches, for the geometry of the first one, with their modulation table if possible.

    batch_rows: usual number of rows per call.
    blocks: see Backbone.load.

    Raises TeacherError, before weights are loaded, for another transformer.
    """
    first = manifests[0]
    check_recorded_transformer(teacher, first.teacher)
    conditions = recorded_conditions(manifests, batch_rows=batch_rows)
    return Backbone.load(
        teacher.path,
        recorded_geometry(first.sampling),
        text_length=first.teacher.text_length,
        dtype=dtype,
        device=device,
        attention_backend=attention_backend,
        options=options,
        conditions=conditions,
        pooled_varies=conditions is None,
        blocks=blocks,
    )

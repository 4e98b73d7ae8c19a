"""Rows of sampling: every way to hold the transformer gives the recorded bits; memory against the plan."""

import torch

from secondcast.cache_builder.sample_stage import sample_shard
from secondcast.check.machine import with_memory
from secondcast.check.results import CheckRow
from secondcast.check.teachers import CheckTeacher
from secondcast.models.cost.placement import sample_stage_cost
from secondcast.models.memory.options import MemoryOptions
from secondcast.models.memory.peak import begin_peak
from secondcast.storage_schemas.progress import Silent, counted
from secondcast.storage_schemas.reader import Cache
from secondcast.storage_schemas.schema.fields import same_bits

_CLAIM = "trajectories sampled again are the recorded ones"


def sampling_modes(blocks: int, *, table: bool) -> dict[str, MemoryOptions]:
    """The exact ways to sample other than with all weights on the device; arguments: see check.training.modes."""
    found = {
        "modulation table": MemoryOptions(modulation="precomputed"),
        "table, half of the blocks streamed": MemoryOptions(modulation="precomputed", gpu_blocks=blocks // 2),
        "all blocks streamed": MemoryOptions(modulation="gpu", gpu_blocks=0),
    }
    return {name: options for name, options in found.items() if table or "table" not in name}


def sampling_name(mode: str) -> str:
    """The name of a row."""
    return f"sample: {mode}"


@torch.no_grad()
def sampling_row(teacher: CheckTeacher, cache: Cache, name: str, options: MemoryOptions) -> CheckRow:
    """Sample the cache's trajectories again with these options."""
    rows, device = teacher.scale.batch_size, teacher.device
    backbone = teacher.backbone(options)
    begin_peak(device)
    sampled = sample_shard(cache, backbone, cache.layout.trajectories[0], rows, Silent(), lambda: None)
    recorded = [cache.trajectory(row) for row in range(rows)]
    equal = sum(
        same_bits(recorded[row].velocity_KSC, sampled["velocity"][row])
        and same_bits(recorded[row].final_latent_SC, sampled["final_latent"][row])
        for row in range(rows)
    )
    row = CheckRow(
        name=sampling_name(name),
        claim=_CLAIM,
        result="holds" if equal == rows else "broken",
        detail=f"bit for bit, {equal} of {counted(rows, 'trajectory')}",
    )
    return with_memory(row, device, sample_stage_cost(cache.manifest, rows).memory(options))

"""The conditions of the calls of a backbone, which a modulation table has a row for."""

from collections.abc import Iterable
from dataclasses import dataclass

from secondcast.storage_schemas.schema.manifest import Manifest

Condition = tuple[float, float | None]
"""Timestep in [0, 1] as the backbone receives it, and guidance; None if it takes none."""


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """All conditions of later calls of a backbone.

    batch_rows: usual number of rows per call. On a CPU a row of a linear's result depends on the number of rows in the
        call, not on their order: a table computed with batch_rows rows per call has the bits of calls of that size.
    """

    pairs: tuple[Condition, ...]
    batch_rows: int


def recorded_conditions(manifests: Iterable[Manifest], *, batch_rows: int) -> Conditions | None:
    """The conditions of these caches; None where a table is impossible.

    With pooled vectors that are not zero every prompt has its own; without pooled vectors there are no modulation
    weights.
    """
    pairs: set[Condition] = set()
    for manifest in manifests:
        if manifest.teacher.pooled != "zero" or not manifest.teacher.pooled_width:
            return None
        values: tuple[float | None, ...] = manifest.sampling.guidance or (None,)
        pairs |= {(timestep, guidance) for timestep in manifest.sampling.timesteps for guidance in values}
    return Conditions(pairs=tuple(pairs), batch_rows=batch_rows)

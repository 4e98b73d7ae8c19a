"""How captions of the pocket world are sampled for scores: options of `evaluate score` and `evaluate table`."""

from pydantic import Field

from secondcast.models.teacher.pipeline_inputs import GUIDANCE, LARGEST_GUIDANCE, STEPS
from secondcast.storage_schemas.schema.flags import Flags

CAPTIONS = 192
"""Held-out captions that a score is of, where no other number is asked for."""


class PocketSampling(Flags):
    """Sampling on the pocket world."""

    steps: int = Field(default=STEPS, ge=1, description="Sampler steps of --pocket.")
    guidance: float = Field(default=GUIDANCE, ge=0, le=LARGEST_GUIDANCE, description="Guidance scale of --pocket.")

"""Options of `evaluate score` and `evaluate table` for sampling captions of the pocket world."""

from pydantic import Field

from secondcast.models.teacher.pipeline_inputs import GUIDANCE, LARGEST_GUIDANCE, STEPS
from secondcast.storage_schemas.schema.flags import Flags

CAPTIONS = 192
"""Default number of held-out captions of a score."""


class PocketSampling(Flags):
    """Sampling on the pocket world."""

    steps: int = Field(default=STEPS, ge=1, description="Sampling steps of --pocket.")
    guidance: float = Field(default=GUIDANCE, ge=0, le=LARGEST_GUIDANCE, description="Guidance scale of --pocket.")

"""How captions of the pocket world are sampled for scores: options of `evaluate score` and `evaluate table`."""

from pydantic import Field

from secondcast.models.teacher.pipeline_inputs import LARGEST_GUIDANCE
from secondcast.storage_schemas.schema.flags import Flags


class PocketSampling(Flags):
    """Sampling on the pocket world."""

    steps: int = Field(default=20, ge=1, description="Sampler steps of --pocket.")
    guidance: float = Field(default=3.5, ge=0, le=LARGEST_GUIDANCE, description="Guidance scale of --pocket.")

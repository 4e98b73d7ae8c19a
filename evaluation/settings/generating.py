"""What pictures are made with: the options of `secondcast generate` that shape them."""

from typing import Annotated

from pydantic import Field

from secondcast.models.teacher.pipeline_inputs import (
    GUIDANCE,
    LARGEST_GUIDANCE,
    LARGEST_TEXT_LENGTH,
    STEPS,
    ImageSize,
)
from secondcast.storage_schemas.schema.flags import Shown
from secondcast.storage_schemas.schema.manifest import Dtype, Pooled

_IMAGES = "Images"


class PictureOptions(ImageSize):
    """All that shapes pictures; None: the teacher's or the student's own."""

    steps: Annotated[int, Shown(group=_IMAGES)] = Field(default=STEPS, ge=1, description="Sampler steps.")
    guidance: Annotated[float, Shown(group=_IMAGES)] = Field(
        default=GUIDANCE, ge=0, le=LARGEST_GUIDANCE, description="FLUX's guidance scale."
    )
    seed: Annotated[int, Shown(group=_IMAGES)] = Field(
        default=0, ge=0, description="The noise is a function of seed and prompt."
    )
    text_length: int | None = Field(
        default=None,
        ge=1,
        le=LARGEST_TEXT_LENGTH,
        description="T5 tokens where `teacher` leads; a student has its own.",
    )
    pooled: Pooled = Field(default="zero", description="FLUX's pooled input; zero: as scored; clip: as FluxPipeline.")
    dtype: Dtype = Field(default="bfloat16", description="Of all arithmetic.")

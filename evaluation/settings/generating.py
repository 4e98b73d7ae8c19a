"""The options of `secondcast generate` that affect the images."""

from typing import Annotated

from pydantic import Field

from secondcast.models.memory.options import MEMORY
from secondcast.models.teacher.pipeline_inputs import (
    GUIDANCE,
    LARGEST_GUIDANCE,
    STEPS,
    ImageSize,
)
from secondcast.storage_schemas.schema.flags import Flag
from secondcast.storage_schemas.schema.manifest import Dtype, Pooled, Quantization

# As for the samples of a cache's prompt.
_MOST_SAMPLES = 10_000
_IMAGES = "Images"


class PictureOptions(ImageSize):
    """Every option that affects the images; None: the teacher's or the student's own."""

    steps: Annotated[int, Flag(group=_IMAGES)] = Field(default=STEPS, ge=1, description="Sampling steps.")
    guidance: Annotated[float, Flag(group=_IMAGES)] = Field(
        default=GUIDANCE, ge=0, le=LARGEST_GUIDANCE, description="Guidance scale."
    )
    seed: Annotated[int, Flag(group=_IMAGES)] = Field(
        default=0, ge=0, description="Seed of the noise, which is a function of seed, prompt and sample."
    )
    samples_per_prompt: Annotated[int, Flag(group=_IMAGES)] = Field(
        default=1, ge=1, le=_MOST_SAMPLES, description="Images per prompt, each from its own noise."
    )
    text_length: int | None = Field(
        default=None,
        ge=1,
        description="Text tokens for `teacher`; a student uses its own number.",
    )
    pooled: Pooled | None = Field(
        default=None,
        description="The pooled text input: zero as in scoring, or CLIP's as in the pipeline. Default: zero; CLIP's "
        "where the family needs it.",
    )
    dtype: Dtype = Field(default="bfloat16", description="Compute dtype.")
    quantize: Annotated[Quantization, Flag(group=MEMORY)] = Field(
        default="none", description="Quantize the transformer's blocks to 8 or 4 bits; the images differ slightly."
    )

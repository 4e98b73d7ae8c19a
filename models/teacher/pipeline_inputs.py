"""Inputs of pipelines that users choose, and their limits; does not import torch."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from secondcast.storage_schemas.schema.flags import Flag, Flags

LARGEST_GUIDANCE = 1e6
"""The transformer multiplies it by 1000 in bfloat16: much larger values are not finite."""
STEPS, GUIDANCE = 20, 3.5
"""The paper's sampler steps, and FluxPipeline's guidance scale for FLUX.1-dev."""
_IMAGES = "Images"


class ImageSize(Flags):
    """The size of images; all None: the teacher's own."""

    resolution: Annotated[int | None, Flag(group=_IMAGES)] = Field(
        default=None, ge=1, description="Side of square images in pixels. Default: 512, or the teacher's own."
    )
    height: Annotated[int | None, Flag(group=_IMAGES)] = Field(
        default=None, ge=1, description="Height of images in pixels, with --width, instead of --resolution."
    )
    width: Annotated[int | None, Flag(group=_IMAGES)] = Field(
        default=None, ge=1, description="Width of images in pixels, with --height."
    )

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        if (self.height is None) != (self.width is None):
            given, other = ("height", "width") if self.width is None else ("width", "height")
            raise ValueError(f"--{given} is given without --{other}: give both, or --resolution for a square")
        if self.height is not None and self.resolution is not None:
            raise ValueError("--resolution is given together with --height and --width: give one or the other")
        return self

"""The options of `secondcast generate` that affect the images."""

from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from secondcast.models.memory.options import MEMORY, TextQuantization
from secondcast.models.teacher.pipeline_inputs import (
    GUIDANCE,
    LARGEST_GUIDANCE,
    STEPS,
    ImageSize,
)
from secondcast.storage_schemas.errors import SettingsError
from secondcast.storage_schemas.schema.flags import Flag
from secondcast.storage_schemas.schema.recording import Dtype, Pooled, Quantization

TEACHER = "teacher"
"""The name of the teacher's own text encoder; a folder with that name is ./teacher."""
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
        default=0, ge=0, description="Seed of the noise, which is the same for every text encoder."
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


class GenerateOptions(PictureOptions):
    """Also what changes or joins the weights, which no plan counts."""

    lora: Annotated[Path | None, Flag(group=_IMAGES, metavar="FILE")] = Field(
        default=None, description="LoRA of the transformer (safetensors), merged into its weights."
    )
    lora_scale: Annotated[float, Flag(group=_IMAGES)] = Field(default=1.0, description="Scale of --lora.")
    controlnet: Annotated[Path | None, Flag(group=_IMAGES, metavar="DIR")] = Field(
        default=None, description="ControlNet of FLUX.1: a folder of diffusers with config.json and safetensors."
    )
    control_images: Annotated[Path | None, Flag(group=_IMAGES, metavar="DIR")] = Field(
        default=None,
        description="Folder with a control image for each prompt, named as the images of this command, or NUMBER.png "
        "with six digits, from 000000.png.",
    )
    controlnet_scale: Annotated[float, Flag(group=_IMAGES)] = Field(
        default=1.0, description="Scale of what --controlnet adds."
    )
    quantize_text_encoder: Annotated[TextQuantization | None, Flag(group=MEMORY)] = Field(
        default=None,
        description="Quantize the text encoder of `teacher` to 8 or 4 bits. A student is quantized by export.",
    )

    @model_validator(mode="after")
    def _scale_has_an_effect(self) -> Self:
        if self.lora is None and "lora_scale" in self.model_fields_set:
            raise SettingsError("--lora-scale has no effect without --lora: remove it, or give both")
        return self

    @model_validator(mode="after")
    def _controlnet_has_images(self) -> Self:
        if (self.controlnet is None) != (self.control_images is None):
            given, missing = ("controlnet", "control-images")[:: 1 if self.controlnet else -1]
            raise SettingsError(f"--{given} is given without --{missing}: give both, or neither")
        if self.controlnet is None and "controlnet_scale" in self.model_fields_set:
            raise SettingsError("--controlnet-scale has no effect without --controlnet: remove it, or give both")
        return self

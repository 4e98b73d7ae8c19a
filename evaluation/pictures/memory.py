"""GPU memory of `secondcast generate`, calculated."""

from secondcast.evaluation.pictures.folder import PictureSettings
from secondcast.evaluation.sampling import picture_geometry
from secondcast.models.cost.placement import SamplingCost
from secondcast.models.cost.transformer import (
    CallShapes,
    backbone_cost,
    clip_parameters,
    decoding_bytes,
    vae_parameters,
)
from secondcast.models.schedule import DTYPES
from secondcast.models.teacher.folder import TeacherFolder

# Of a student, and of the VAE.
_FLOAT32_BYTES = 4


def sampling_cost(
    settings: PictureSettings, teacher: TeacherFolder, *, batch_size: int, student_parameters: int | None
) -> SamplingCost:
    """What sampling needs. student_parameters: None for the teacher's text encoder, which is freed before."""
    config, geometry = (
        teacher.config("transformer"),
        picture_geometry(teacher, resolution=None, height=settings.height, width=settings.width),
    )
    itemsize = DTYPES[settings.dtype].itemsize
    backbone = backbone_cost(
        CallShapes(
            config=config,
            image_tokens=geometry.image_tokens,
            channels=geometry.channels,
            text_length=settings.text_length,
            text_width=int(config["joint_attention_dim"]),
            pooled_width=int(config["pooled_projection_dim"]),
            takes_guidance=settings.guidance is not None,
            dtype=settings.dtype,
        )
    )
    vae = teacher.config("vae")
    clip = itemsize * clip_parameters(teacher.config("text_encoder")) if settings.pooled == "clip" else 0
    latent_bytes = geometry.image_tokens * geometry.channels * itemsize
    return SamplingCost(
        backbone=backbone,
        dtype_bytes=itemsize,
        batch_size=batch_size,
        beside_bytes=_FLOAT32_BYTES * (vae_parameters(vae) + (student_parameters or 0)) + clip,
        # Latents and predictions of every step, and the final latent; the text embedding, in fp32 from a student.
        row_bytes=(2 * settings.steps + 1) * latent_bytes
        + settings.text_length * int(config["joint_attention_dim"]) * (_FLOAT32_BYTES + itemsize),
        decoding_bytes=decoding_bytes(vae, geometry),
        table_rows=None if settings.pooled == "clip" else settings.steps,
    )

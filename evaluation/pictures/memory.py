"""GPU memory of sampling and scoring with students, calculated."""

from secondcast.evaluation.pictures.folder import PictureSettings
from secondcast.evaluation.sampling import picture_geometry
from secondcast.evaluation.settings.cache_scoring import CacheScoring
from secondcast.models.cost.gpu_memory import table_rows
from secondcast.models.cost.placement import SamplingCost
from secondcast.models.cost.transformer import (
    CallShapes,
    backbone_cost,
    clip_parameters,
    decoding_bytes,
    vae_parameters,
)
from secondcast.models.geometry import recorded_geometry
from secondcast.models.schedule import DTYPES
from secondcast.models.teacher.folder import TeacherFolder
from secondcast.storage_schemas.schema.manifest import Manifest

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


def scoring_cost(
    manifest: Manifest, teacher: TeacherFolder, settings: CacheScoring, *, student_parameters: int
) -> SamplingCost:
    """What an evaluation on a cache needs. student_parameters: of all students on the GPU."""
    dtype = settings.dtype_of(manifest)
    sampling, itemsize = manifest.sampling, DTYPES[dtype].itemsize
    embedding_bytes = manifest.teacher.text_length * manifest.teacher.text_width * (_FLOAT32_BYTES + itemsize)
    parameters, decoding = student_parameters, 0
    if settings.closed_loop:
        vae = teacher.config("vae")
        parameters += vae_parameters(vae)
        decoding = decoding_bytes(vae, recorded_geometry(sampling))
    return SamplingCost(
        backbone=backbone_cost(CallShapes.of(manifest).model_copy(update={"dtype": dtype})),
        dtype_bytes=itemsize,
        batch_size=settings.batch_size,
        beside_bytes=_FLOAT32_BYTES * parameters,
        row_bytes=(2 * sampling.steps + 1) * sampling.image_tokens * sampling.channels * itemsize + embedding_bytes,
        decoding_bytes=decoding,
        table_rows=table_rows(manifest),
    )

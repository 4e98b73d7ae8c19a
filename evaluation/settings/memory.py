"""What sampling and scoring need on the GPU with given settings, calculated without torch."""

from secondcast.evaluation.pictures.folder import PictureSettings
from secondcast.evaluation.settings.cache_scoring import CacheScoring
from secondcast.models.cost.counted import backbone_cost, decoding_bytes, teacher_clip_parameters, vae_parameters
from secondcast.models.cost.gpu_memory import table_rows
from secondcast.models.cost.placement import SamplingCost
from secondcast.models.cost.shapes import CallShapes
from secondcast.models.geometry import recorded_geometry
from secondcast.models.memory.options import MemoryOptions, SamplingMemory
from secondcast.models.teacher.folder import TeacherFolder
from secondcast.models.teacher.pipeline_inputs import ImageSize
from secondcast.storage_schemas.schema.fields import DTYPES
from secondcast.storage_schemas.schema.manifest import Manifest

FLOAT32_BYTES = 4
"""Of a weight of a student or of the VAE."""


def sampling_options(memory: SamplingMemory, settings: PictureSettings) -> MemoryOptions:
    """The memory options of a generation as far as they are given."""
    # With CLIP's pooled vectors "auto" might compute on the host, which rounds differently.
    varies = settings.pooled == "clip"
    return memory.placed(settings.quantize, pooled_varies=varies, auto="gpu" if varies else "auto")


def sampling_cost(
    settings: PictureSettings, teacher: TeacherFolder, *, batch_size: int, student_parameters: int | None
) -> SamplingCost:
    """What sampling needs. student_parameters: None for the teacher's text encoder, which is freed before."""
    family, config = teacher.family, teacher.config("transformer")
    geometry = teacher.geometry(ImageSize(height=settings.height, width=settings.width))
    itemsize = DTYPES[settings.dtype].itemsize
    shapes = CallShapes.of_teacher(
        family, config, geometry, text_length=settings.text_length, dtype=settings.dtype,
        conditioning=teacher.conditioning,
    )  # fmt: skip
    vae = teacher.config("vae")
    clip = itemsize * teacher_clip_parameters(teacher) if settings.pooled == "clip" else 0
    latent_bytes = geometry.image_tokens * geometry.channels * itemsize
    return SamplingCost(
        backbone=backbone_cost(shapes),
        dtype_bytes=itemsize,
        batch_size=batch_size,
        rows_per_call=family.rows_per_call,
        beside_bytes=FLOAT32_BYTES * (vae_parameters(vae, family) + (student_parameters or 0)) + clip,
        # Latents and predictions of every step, and the final latent; the text embedding, in fp32 from a student.
        row_bytes=(2 * settings.steps + 1) * latent_bytes
        + settings.text_length * family.text_width(config) * (FLOAT32_BYTES + itemsize),
        decoding_bytes=min(batch_size, geometry.decoded_at_once) * decoding_bytes(vae, family, geometry),
        table_rows=settings.steps if settings.pooled == "zero" and teacher.family.anatomy.modulation else None,
    )


def scoring_cost(
    manifest: Manifest,
    teacher: TeacherFolder,
    settings: CacheScoring,
    *,
    student_parameters: int,
    gradients: bool = False,
    beside_bytes: int = 0,
) -> SamplingCost:
    """What an evaluation on a cache needs.

    student_parameters: of the student; an untrained one is as large.
    gradients: whether gradients by the embedding are taken, with every block recomputed.
    beside_bytes: of other tensors on the GPU.
    """
    dtype = settings.dtype_of(manifest)
    sampling, itemsize = manifest.sampling, DTYPES[dtype].itemsize
    embedding_bytes = manifest.teacher.text_length * manifest.teacher.text_width * (FLOAT32_BYTES + itemsize)
    parameters, decoding = student_parameters * (2 if settings.random_baseline and settings.closed_loop else 1), 0
    if settings.closed_loop:
        vae = teacher.config("vae")
        parameters += vae_parameters(vae, teacher.family)
        decoding = decoding_bytes(vae, teacher.family, recorded_geometry(sampling))
    backbone = backbone_cost(CallShapes.of(manifest).model_copy(update={"dtype": dtype}))
    row_bytes = (2 * sampling.steps + 1) * sampling.image_tokens * sampling.channels * itemsize + embedding_bytes
    if gradients:
        recomputed = MemoryOptions(activation_checkpointing=1)
        row_bytes += max(0, backbone.training_bytes(recomputed) - backbone.forward_peak_bytes)
    return SamplingCost(
        backbone=backbone,
        dtype_bytes=itemsize,
        batch_size=settings.batch_size,
        rows_per_call=sampling.rows_per_call if settings.closed_loop else 1,
        beside_bytes=FLOAT32_BYTES * parameters + beside_bytes,
        row_bytes=row_bytes,
        decoding_bytes=decoding,
        table_rows=table_rows(manifest),
    )

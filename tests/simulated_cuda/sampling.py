"""Build, evaluate and generate with FLUX.1-dev on the simulated device, as the commands call these parts."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from secondcast.cache_builder.sample_stage import sample_shard
from secondcast.cache_builder.teacher_models import sampling_cost as build_cost
from secondcast.cache_builder.text_stage import encode_prompts
from secondcast.evaluation.closed_loop import closed_loop
from secondcast.evaluation.held_out import held_out_trajectories
from secondcast.evaluation.on_cache import scoring_cost
from secondcast.evaluation.open_loop import open_loop
from secondcast.evaluation.pictures.folder import PictureSettings
from secondcast.evaluation.replaying import CacheStudent, cached_embeddings
from secondcast.evaluation.sampling import Generator
from secondcast.evaluation.sampling import sampling_cost as generate_cost
from secondcast.evaluation.settings.cache_scoring import CacheScoring
from secondcast.models.cost.gpu_memory import GpuMemory, text_stage_memory
from secondcast.models.cost.text import student_cost, text_encoder_cost
from secondcast.models.families.flux import FLUX
from secondcast.models.geometry import Geometry, recorded_geometry
from secondcast.models.memory.modulation_table import Conditions, recorded_conditions
from secondcast.models.memory.options import PLAIN, MemoryOptions
from secondcast.models.recorded_backbone import recorded_schedule
from secondcast.models.schedule import DTYPES
from secondcast.models.student.student_network import SecondcastStudent
from secondcast.models.teacher.image_decoder import ImageDecoder
from secondcast.storage_schemas.progress import Silent
from secondcast.storage_schemas.schema.manifest import Manifest
from tests.simulated_cuda import flux
from tests.simulated_cuda.device import CUDA
from tests.simulated_cuda.measured import Measured, Planned
from tests.simulated_cuda.session import Session

# Of each trajectory: all steps need the same memory, but for the latents that are kept.
STEPS = 2
STUDENT = "base"
ON_GPU = MemoryOptions(modulation="gpu")
GUIDANCE = 3.5


@dataclass(frozen=True, kw_only=True)
class SamplingRow:
    """A part of a command, with the memory that the product calculates for it."""

    name: str
    memory: Callable[[], GpuMemory]
    part: Callable[[Session], None]

    def planned(self) -> Planned:
        """The memory that the product calculates."""
        return Planned.of(self.memory())

    def run(self, session: Session) -> Measured:
        """Run the part."""
        session.release()
        with session.device as device:
            self.part(session)
            return device.measured()


def _manifest(pixels: int, prompts: int) -> Manifest:
    return flux.manifest_of(pixels, prompts=prompts, steps=STEPS, shard_size=prompts)


def _decoder(session: Session, geometry: Geometry) -> ImageDecoder:
    return ImageDecoder(flux.vae(session.device.without_data).to(CUDA), FLUX, geometry)


def _student(session: Session, manifest: Manifest) -> SecondcastStudent:
    return flux.student(session.device.without_data, STUDENT, manifest).eval().to(CUDA)


TEXT_BATCH = 16


def _encoding_memory() -> GpuMemory:
    manifest = _manifest(512, TEXT_BATCH)
    itemsize = DTYPES[manifest.sampling.dtype].itemsize
    return text_stage_memory(text_encoder_cost(manifest), dtype_bytes=itemsize, batch_size=TEXT_BATCH)


def _encode(session: Session) -> None:
    manifest = _manifest(512, TEXT_BATCH)
    encoder = flux.text_encoder(session.device.without_data, manifest)
    encoder.model.to(CUDA)
    encode_prompts(encoder, manifest.teacher, flux.prompts(2 * TEXT_BATCH), TEXT_BATCH)


def _build_memory(pixels: int, batch_size: int) -> GpuMemory:
    return build_cost(_manifest(pixels, batch_size), batch_size).memory(ON_GPU)


def _build(pixels: int, batch_size: int, session: Session) -> None:
    manifest = _manifest(pixels, 2 * batch_size)
    cache = session.cache(f"built, {pixels} px", manifest)
    backbone = session.backbone("build", manifest, ON_GPU, None)
    for shard in cache.layout.trajectories:
        sample_shard(cache, backbone, shard, batch_size, Silent(), lambda: None)


SCORING = CacheScoring(num_trajectories=4, closed_loop=2, batch_size=4)


def _scoring_memory(pixels: int) -> GpuMemory:
    manifest = _manifest(pixels, SCORING.num_trajectories)
    parameters = student_cost(STUDENT, manifest).parameters
    return scoring_cost(manifest, flux.TEACHER, SCORING, student_parameters=parameters).memory(PLAIN)


def _evaluate(pixels: int, session: Session) -> None:
    manifest = _manifest(pixels, SCORING.num_trajectories)
    cache = session.cache(f"held out, {pixels} px", manifest, held_out=True)
    student = CacheStudent(network=_student(session, manifest), tokens=None, cache=cache, digest="")
    conditions = recorded_conditions([manifest], batch_rows=SCORING.batch_size)
    backbone = session.backbone("evaluate", manifest, SCORING.memory_of(manifest), conditions)
    encoders = {"student": student.embeddings, "teacher": cached_embeddings(cache, CUDA)}
    chosen = held_out_trajectories(cache)
    open_loop(
        cache, backbone, encoders, chosen, SCORING.steps_on(cache), batch_size=SCORING.batch_size, progress=Silent()
    )
    closed_loop(
        cache,
        backbone,
        _decoder(session, recorded_geometry(manifest.sampling)),
        encoders,
        chosen[: SCORING.closed_loop],
        lpips=None,
        batch_size=SCORING.batch_size,
        progress=Silent(),
    )


def _generating_memory(pixels: int, batch_size: int) -> GpuMemory:
    manifest = _manifest(pixels, batch_size)
    settings = PictureSettings(
        student=STUDENT,
        teacher="FLUX.1-dev",
        text_length=manifest.teacher.text_length,
        height=pixels,
        width=pixels,
        steps=STEPS,
        schedule="diffusers",
        guidance=GUIDANCE,
        seed=0,
        dtype="bfloat16",
        pooled="zero",
    )
    parameters = student_cost(STUDENT, manifest).parameters
    return generate_cost(settings, flux.TEACHER, batch_size=batch_size, student_parameters=parameters).memory(PLAIN)


@torch.no_grad()
def _generate(pixels: int, batch_size: int, session: Session) -> None:
    manifest = _manifest(pixels, batch_size)
    schedule, geometry = recorded_schedule(manifest), recorded_geometry(manifest.sampling)
    student = _student(session, manifest)
    pairs = tuple((timestep, GUIDANCE) for timestep in schedule.timesteps)
    generator = Generator(
        backbone=session.backbone("generate", manifest, PLAIN, Conditions(pairs=pairs, batch_rows=batch_size)),
        decoder=_decoder(session, geometry),
        schedule=schedule,
        geometry=geometry,
        teacher=flux.TEACHER,
        guidance=GUIDANCE,
        seed=0,
    )
    ids_BT = torch.from_numpy(np.ones((batch_size, manifest.teacher.text_length), dtype=np.int64))
    images_BHWC = generator.pictures(student(ids_BT.to(CUDA))[0], [f"prompt {row}" for row in range(batch_size)])
    assert images_BHWC.shape == (batch_size, pixels, pixels, 3)


SAMPLING = (
    SamplingRow(name=f"build: text, batch {TEXT_BATCH}", memory=_encoding_memory, part=_encode),
    *(
        SamplingRow(
            name=f"build: sampling, {pixels} px, batch 16",
            memory=partial(_build_memory, pixels, 16),
            part=partial(_build, pixels, 16),
        )
        for pixels in (512, 1024)
    ),
    SamplingRow(
        name="evaluate, 512 px, batch 4", memory=partial(_scoring_memory, 512), part=partial(_evaluate, 512)
    ),
    *(
        SamplingRow(
            name=f"generate, {pixels} px, batch {batch_size}",
            memory=partial(_generating_memory, pixels, batch_size),
            part=partial(_generate, pixels, batch_size),
        )
        for pixels, batch_size in ((512, 4), (1024, 1))
    ),
)

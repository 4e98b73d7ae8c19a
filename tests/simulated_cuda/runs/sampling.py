"""Build, evaluate and generate with FLUX.1-dev on the simulated device, as the commands call these parts."""

from collections.abc import Callable
from typing import Any

import torch

from secondcast.cache_builder.sample_stage import sample_shard
from secondcast.cache_builder.text_stage import encode_prompts
from secondcast.evaluation.closed_loop import closed_loop
from secondcast.evaluation.held_out import held_out_trajectories
from secondcast.evaluation.open_loop import open_loop
from secondcast.evaluation.replaying import CacheStudent, cached_embeddings
from secondcast.evaluation.sampling import Generator
from secondcast.models.families.flux import FLUX
from secondcast.models.geometry import Geometry, recorded_geometry
from secondcast.models.memory.conditions import Conditions, recorded_conditions
from secondcast.models.memory.options import PLAIN
from secondcast.models.recorded_backbone import recorded_schedule
from secondcast.models.student.student_network import SecondcastStudent
from secondcast.models.teacher.image_decoder import ImageDecoder
from secondcast.storage_schemas.progress import Silent
from secondcast.storage_schemas.schema.manifest import Manifest
from tests.simulated_cuda.device.simulated import CUDA
from tests.simulated_cuda.runs import flux
from tests.simulated_cuda.runs.rows import GUIDANCE, TEACHER, BuildRow, EvaluateRow, GenerateRow, Row, TextRow
from tests.simulated_cuda.runs.session import Session


def _encode(row: TextRow, session: Session) -> None:
    encoder = flux.text_encoder(session.device.without_data, row.manifest)
    encoder.model.to(CUDA)
    encode_prompts(encoder, row.manifest.teacher, flux.prompts(row.manifest.prompts.count), row.batch_size)


def _build(row: BuildRow, session: Session) -> None:
    cache = session.cache(f"build-{row.pixels}", row.manifest)
    backbone = session.backbone(row, row.manifest, row.options, None)
    for shard in cache.layout.trajectories:
        sample_shard(cache, backbone, shard, row.batch_size, Silent(), lambda: None)


def _evaluate(row: EvaluateRow, session: Session) -> None:
    manifest, scoring = row.manifest, row.scoring
    cache = session.cache(f"evaluate-{row.pixels}", manifest, held_out=True)
    student = CacheStudent(network=_student(session, manifest), tokens=None, cache=cache, digest="")
    conditions = recorded_conditions([manifest], batch_rows=scoring.batch_size)
    backbone = session.backbone(row, manifest, scoring.memory_of(manifest), conditions)
    encoders = {"student": student.embeddings, "teacher": cached_embeddings(cache, CUDA)}
    chosen = held_out_trajectories(cache)
    how: dict[str, Any] = {"batch_size": scoring.batch_size, "progress": Silent()}
    open_loop(cache, backbone, encoders, chosen, scoring.steps_on(cache), **how)
    decoder = _decoder(session, recorded_geometry(manifest.sampling))
    sampled = {"student": student.embeddings}
    closed_loop(cache, backbone, decoder, sampled, chosen[: scoring.closed_loop], lpips=None, **how)


@torch.no_grad()
def _generate(row: GenerateRow, session: Session) -> None:
    manifest, batch_size = row.manifest, row.batch_size
    schedule, geometry = recorded_schedule(manifest), recorded_geometry(manifest.sampling)
    student = _student(session, manifest)
    pairs = tuple((timestep, GUIDANCE) for timestep in schedule.timesteps)
    generator = Generator(
        backbone=session.backbone(row, manifest, PLAIN, Conditions(pairs=pairs, batch_rows=batch_size)),
        decoder=_decoder(session, geometry),
        schedule=schedule,
        geometry=geometry,
        teacher=TEACHER,
        guidance=GUIDANCE,
        seed=0,
    )
    ids_BT = torch.ones(batch_size, manifest.teacher.text_length, dtype=torch.int64)
    images_BHWC = generator.pictures(student(ids_BT.to(CUDA))[0], [f"prompt {number}" for number in range(batch_size)])
    assert images_BHWC.shape == (batch_size, row.pixels, row.pixels, 3)


def _student(session: Session, manifest: Manifest) -> SecondcastStudent:
    return flux.student(session.device.without_data, manifest).eval().to(CUDA)


def _decoder(session: Session, geometry: Geometry) -> ImageDecoder:
    return ImageDecoder(flux.vae(session.device.without_data).to(CUDA), FLUX, geometry)


PARTS: dict[type[Row], Callable[[Any, Session], None]] = {
    TextRow: _encode,
    BuildRow: _build,
    EvaluateRow: _evaluate,
    GenerateRow: _generate,
}
"""What runs a row of each kind."""

"""Generates images with a text encoder in place of T5-XXL, from the same noise for every text encoder."""

from collections.abc import Sequence
from pathlib import Path

import torch

from secondcast.evaluation.pictures.folder import PictureFolder, PictureSettings
from secondcast.evaluation.sampling import Generator, picture_geometry
from secondcast.evaluation.settings.generating import PictureOptions
from secondcast.evaluation.text_encoder import open_text_encoder
from secondcast.models.schedule import DTYPES
from secondcast.models.teacher.folder import TeacherFolder
from secondcast.models.teacher.text_encoder import PooledTextEncoder
from secondcast.storage_schemas.io.digests import digest
from secondcast.storage_schemas.progress import Progress


def generate(
    student: str,
    teacher: TeacherFolder,
    prompts: Sequence[str],
    folder: Path,
    asked: PictureOptions,
    *,
    batch_size: int,
    device: torch.device,
    progress: Progress,
) -> int:
    """Write a PNG per prompt and an index; return how many images were missing. Resumes when called again.

    student: a run folder, an export, or `teacher`.
    Batches are defined by prompt numbers, so that a resumed run gives the same images as an uninterrupted one.
    """
    dtype = DTYPES[asked.dtype]
    leader = open_text_encoder(student, teacher, text_length=asked.text_length, dtype=dtype, device=device)
    settings = _settings(asked, teacher, student=leader.digest, text_length=leader.text_length)
    texts = list(prompts)
    pictures = PictureFolder.open(folder, settings, texts, earlier_digest=leader.weights_digest)
    if settings.guidance is not None and (trained := leader.trained_guidance) is not None:
        low, high = trained
        if not low <= settings.guidance <= high:
            progress.say(f"guidance {settings.guidance:g} is outside the student's training range, {low:g} to {high:g}")
    missing = pictures.missing
    if not missing:
        return 0
    studio = Generator.open(
        teacher, resolution=None, height=settings.height, width=settings.width, text_length=settings.text_length,
        steps=asked.steps, guidance=asked.guidance, seed=asked.seed, dtype=dtype, device=device,
    )  # fmt: skip
    pooled = PooledTextEncoder.load(teacher, dtype=dtype, device=device) if asked.pooled == "clip" else None
    with progress.bar("generate", total=len(texts), done=len(texts) - len(missing), unit="images") as bar:
        for batch in sorted({number // batch_size for number in missing}):
            numbers = range(batch * batch_size, min((batch + 1) * batch_size, len(texts)))
            part = [texts[number] for number in numbers]
            pooled_BP = None if pooled is None else pooled.encode(part)
            images_BHWC = studio.pictures(leader.embeddings(part, device), part, pooled_BP)
            bar.advance(pictures.add(numbers, images_BHWC))
    pictures.finish()
    return len(missing)


def _settings(asked: PictureOptions, teacher: TeacherFolder, *, student: str, text_length: int) -> PictureSettings:
    geometry = picture_geometry(teacher, resolution=asked.resolution, height=asked.height, width=asked.width)
    parts = ("transformer", "vae", *(("text_encoder",) if asked.pooled == "clip" else ()))
    return PictureSettings.from_flags(
        student=student,
        teacher=digest([*(teacher.weight_hashes(part) for part in parts), teacher.config("scheduler")]),
        text_length=text_length,
        height=geometry.height,
        width=geometry.width,
        steps=asked.steps,
        schedule="diffusers",
        guidance=asked.guidance if teacher.config("transformer")["guidance_embeds"] else None,
        seed=asked.seed,
        dtype=asked.dtype,
        pooled=asked.pooled,
    )

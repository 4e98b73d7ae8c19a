"""`inspect compare`: samples with several students from the cached noise, beside the teacher's images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from secondcast.evaluation.closed_loop import RECORDED, closed_loop
from secondcast.evaluation.held_out import HeldOut, held_out_trajectories, spread
from secondcast.evaluation.on_cache import backbone_of
from secondcast.evaluation.open_loop import open_loop
from secondcast.evaluation.pictures.distances import check_measurable
from secondcast.evaluation.replaying import CacheStudent, EmbedPrompts, cached_embeddings
from secondcast.evaluation.results import SampledResult, StepErrors
from secondcast.evaluation.settings.cache_scoring import CacheScoring
from secondcast.models.memory.meta_run import parameter_count
from secondcast.models.student.tokens import text_length_remark
from secondcast.models.teacher.folder import TeacherFolder
from secondcast.models.teacher.image_decoder import load_recorded_decoder
from secondcast.storage_schemas.errors import NotInCacheError, SettingsError
from secondcast.storage_schemas.progress import Progress
from secondcast.storage_schemas.reader import Cache
from secondcast.storage_schemas.schema.fields import Array

DEFAULT_COUNT = 8
REPLAY_ERROR = "replay_error"
_INSTEAD = "`secondcast evaluate score --closed-loop 0` gives the errors by step without images"


@dataclass(frozen=True, kw_only=True)
class Compared:
    """Students compared with the teacher on the same trajectories, in their order.

    errors: open loop, by name, with REPLAY_ERROR if the cache has the teacher's embeddings.
    results: closed loop, by student.
    pictures: uint8 HWC by name, including RECORDED.
    """

    cache: Cache
    students: Mapping[str, CacheStudent]
    folders: Mapping[str, Path]
    backbone: str
    trajectories: Sequence[HeldOut]
    errors: Mapping[str, StepErrors]
    results: Mapping[str, SampledResult]
    pictures: Mapping[str, Sequence[Array]]


def names_of(students: Sequence[Path]) -> dict[str, Path]:
    """Students by the names of their folders, or by their full paths if two have the same name.

    SettingsError for a student given twice.
    """
    if twice := next((student for student in students if students.count(student) > 1), None):
        raise SettingsError(f"--student {twice} is given twice: give each student once")
    short = [student.resolve().name for student in students]
    return {
        str(student) if short.count(name) > 1 or name in (RECORDED, REPLAY_ERROR, "") else name: student
        for student, name in zip(students, short, strict=True)
    }


def chosen_trajectories(cache: Cache, keys: Sequence[str]) -> list[HeldOut]:
    """The trajectories of these keys, or some held-out ones, chosen as in an evaluation; NotInCacheError."""
    if keys:
        # An index and a key may name the same trajectory.
        return [_named(cache, index) for index in dict.fromkeys(map(cache.key_index, keys))]
    try:
        everything = held_out_trajectories(cache)
    except NotInCacheError as error:
        raise NotInCacheError(f"{error}; or name trajectories to compare: `inspect compare CACHE KEY...`") from error
    return [everything[place] for place in spread(everything, DEFAULT_COUNT)]


def _named(cache: Cache, index: int) -> HeldOut:
    trajectory = cache.trajectory(index)
    prompt = cache.prompts[trajectory.prompt]
    return HeldOut(
        index=index,
        key=trajectory.key,
        prompt=trajectory.prompt,
        text=prompt.text,
        sources=prompt.sources,
        guidance=trajectory.guidance,
    )


def compare_students(
    cache: Cache,
    folders: Mapping[str, Path],
    trajectories: Sequence[HeldOut],
    teacher: TeacherFolder,
    settings: CacheScoring,
    *,
    device: torch.device,
    progress: Progress,
) -> Compared:
    """Replay and sample with each student on one backbone. teacher: provides the transformer and VAE.

    Incompatible inputs are refused before backbone weights are loaded: StudentError, TeacherError, SettingsError.
    """
    sampling = cache.manifest.sampling
    check_measurable(sampling.height, sampling.width, instead=_INSTEAD)
    students = {name: CacheStudent.open(folder, cache, device) for name, folder in folders.items()}
    for name, student in students.items():
        if remark := text_length_remark(student.network, cache.manifest.teacher):
            progress.say(f"{name}: {remark}")
    text_encoders: dict[str, EmbedPrompts] = {name: student.embeddings for name, student in students.items()}
    replay_error = {REPLAY_ERROR: cached_embeddings(cache, device)} if sampling.storage.embeddings == "stored" else {}
    decoder = load_recorded_decoder(teacher, sampling, device)
    parameters = sum(parameter_count(student.network) for student in students.values())
    backbone = backbone_of(cache, teacher, settings, device, progress, student_parameters=parameters)
    pictures: dict[str, list[Array]] = {RECORDED: [], **{name: [] for name in text_encoders}}
    errors = open_loop(
        cache, backbone, text_encoders | replay_error, trajectories, settings.steps_on(cache),
        batch_size=settings.batch_size, progress=progress,
    )  # fmt: skip
    results = closed_loop(
        cache,
        backbone,
        decoder,
        text_encoders,
        trajectories,
        lpips=None,
        batch_size=settings.batch_size,
        progress=progress,
        keep=lambda name, _, picture_HWC: pictures[name].append(picture_HWC),
    )
    return Compared(
        cache=cache,
        students=students,
        folders=folders,
        backbone=teacher.source,
        trajectories=trajectories,
        errors=errors,
        results=results,
        pictures=pictures,
    )


def compared_facts(compared: Compared) -> dict[str, Any]:
    """All values as plain JSON types; psnr_db is None if an image is identical to the recorded one."""
    sampling = compared.cache.manifest.sampling
    names = list(compared.results)
    return {
        "cache": compared.cache.location,
        "backbone": compared.backbone,
        "sigmas": list(sampling.sigmas[:-1]),
        "students": [
            {
                "name": name,
                "student": str(compared.folders[name]),
                "student_digest": compared.students[name].digest,
                "error_fraction_by_step": _means(compared.errors[name]),
            }
            for name in names
        ],
        "replay_error_fraction_by_step": _means(compared.errors[REPLAY_ERROR])
        if REPLAY_ERROR in compared.errors
        else None,
        "trajectories": [
            {
                "index": chosen.index,
                "key": chosen.key,
                "prompt": chosen.text,
                "guidance": chosen.guidance,
                "held_out": compared.cache.prompts[chosen.prompt].held_out,
                "students": {name: _on(compared, name, row) for name in names},
            }
            for row, chosen in enumerate(compared.trajectories)
        ],
    }


def _on(compared: Compared, name: str, row: int) -> dict[str, Any]:
    result = compared.results[name]
    return {
        "latent_fraction": result.latent_fraction[row],
        "psnr_db": result.psnr_db[row],
        "ssim": result.ssim[row],
        "error_fraction_by_step": list(compared.errors[name].error_fraction[row]),
    }


def _means(errors: StepErrors) -> list[float]:
    return [sum(column) / len(column) for column in zip(*errors.error_fraction, strict=True)]

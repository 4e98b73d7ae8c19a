"""A student against held-out trajectories of a cache, on its backbone: open loop, and closed loop where asked."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from evaluation.closed_loop import closed_loop
from evaluation.held_out import HeldOut, held_out_trajectories, spread
from evaluation.open_loop import open_loop
from evaluation.picture_distances import Lpips, check_measurable, lpips_missing
from evaluation.replaying import CacheStudent, EmbedPrompts, cached_embeddings
from evaluation.results import ClosedLoop, Computed, Evaluated, Evaluation
from models.attention import check_attention, recorded_attention
from models.backbone import FluxBackbone
from models.geometry import recorded_geometry
from models.image_decoder import ImageDecoder
from models.memory_options import MemoryOptions
from models.quantized import check_quantizer
from models.recorded_backbone import load_recorded_backbone
from models.schedule import DTYPES
from models.student_tokens import text_length_remark
from models.teacher_folder import TeacherFolder
from storage_schemas.errors import BadSettings
from storage_schemas.manifest import Flags, Manifest, Quantization
from storage_schemas.progress import Progress
from storage_schemas.reader import Cache

# Law 3: replayed exactly, the teacher's own embedding is never off by more than this part of the velocity's norm.
_LARGEST_FLOOR = 0.03


class CacheScoring(Flags):
    """The flags of an evaluation on a cache.

    count: trajectories of the open loop; closed_loop: how many of these are sampled anew. steps_of: None: all.
    "cache": as the cache was recorded. seed: of the untrained student's weights. The rest: see MemoryOptions.
    """

    count: int = Field(default=64, ge=1)
    steps_of: tuple[int, ...] | None = Field(default=None, min_length=1)
    closed_loop: int = Field(default=16, ge=0)
    untrained: bool = False
    batch_size: int = Field(default=8, ge=1)
    backbone_dtype: Literal["cache", "bfloat16", "float32"] = "cache"
    quantize: Literal["cache"] | Quantization = "cache"
    modulation: Literal["auto", "table", "host", "live"] = "auto"
    resident_blocks: int | None = Field(default=None, ge=0)
    attention_backend: str | None = None
    seed: int = Field(default=0, ge=0)

    def dtype_of(self, manifest: Manifest) -> Literal["bfloat16", "float32"]:
        """Of the backbone, on a cache."""
        return manifest.sampling.dtype if self.backbone_dtype == "cache" else self.backbone_dtype

    def memory_of(self, manifest: Manifest) -> MemoryOptions:
        """How the backbone is held, on a cache."""
        quantize = manifest.sampling.quantize if self.quantize == "cache" else self.quantize
        return MemoryOptions.from_flags(
            modulation=self.modulation,
            resident_blocks=self.resident_blocks,
            quantize=quantize,
            # Without a gradient nothing is checkpointed: it is what 8 bits are refused without.
            checkpoint_blocks=1 if quantize in ("int8", "fp8") else 0,
        )

    def steps_on(self, cache: Cache) -> tuple[int, ...]:
        """Ascending numbers of steps; BadSettings for one that the cache has not."""
        steps = cache.manifest.sampling.steps
        chosen = tuple(range(steps)) if self.steps_of is None else tuple(sorted(set(self.steps_of)))
        if beyond := [step for step in chosen if not 0 <= step < steps]:
            raise BadSettings(
                f"--steps-of names step {beyond[0]}, the trajectories of {cache.folder} have the steps 0 to {steps - 1}"
            )
        return chosen


@dataclass(frozen=True, kw_only=True)
class _Task:
    """What is evaluated, once all of it is known to fit together."""

    cache: Cache
    settings: CacheScoring
    student: CacheStudent
    held_out: int
    chosen: Sequence[HeldOut]
    steps: tuple[int, ...]
    device: torch.device
    progress: Progress

    @property
    def taught(self) -> EmbedPrompts | None:
        """The teacher's embeddings, where the cache has them."""
        stored = self.cache.manifest.sampling.storage.embeddings == "stored"
        return cached_embeddings(self.cache, self.device) if stored else None


def evaluate_on_cache(
    student: Path,
    cache: Cache,
    teacher: TeacherFolder,
    settings: CacheScoring,
    *,
    device: torch.device,
    progress: Progress,
) -> Evaluation:
    """Evaluate the student of a run folder or an export. teacher: its transformer, and VAE for a closed loop.

    What does not fit is refused before weights are loaded: NotInCache, BadStudent, BadTeacher, BadSettings.
    """
    task = _checked(student, cache, settings, device, progress)
    options = settings.memory_of(cache.manifest)
    backbone = _backbone(task, teacher, options)
    encoders = {"student": task.student.embeddings} | ({} if task.taught is None else {"floor": task.taught})
    found = open_loop(
        cache, backbone, encoders, task.chosen, task.steps, batch_size=settings.batch_size, progress=progress
    )
    closed = _closed(task, backbone, teacher) if settings.closed_loop else None
    evaluation = Evaluation(
        student=str(student),
        backbone=teacher.source,
        computed=_computed(task, options),
        errors=found["student"],
        floor=found.get("floor"),
        closed_loop=closed,
        **_of_task(task),
    )
    _remark_on_floor(evaluation, progress)
    return evaluation


def _of_task(task: _Task) -> dict[str, Any]:
    """The fields of an evaluation that are known before anything is computed."""
    cache = task.cache
    digests, sigmas = cache.manifest.digests(), cache.manifest.sampling.sigmas
    return {
        "created_by": f"understudy {version('understudy')}",
        "student_digest": task.student.digest,
        "cache": cache.location,
        "sampling_digest": digests["sampling"],
        "teacher_digest": digests["teacher"],
        "committed": len(cache),
        "held_out": task.held_out,
        "steps": task.steps,
        "sigmas": tuple(sigmas[k] for k in task.steps),
        "trajectories": tuple(
            Evaluated(key=one.key, prompt=one.text, sources=one.sources, guidance=cache.guidance(one.index))
            for one in task.chosen
        ),
    }


def _backbone(task: _Task, teacher: TeacherFolder, options: MemoryOptions) -> FluxBackbone:
    settings, manifest = task.settings, task.cache.manifest
    dtype = DTYPES[settings.dtype_of(manifest)]
    check_quantizer(options.quantize)
    check_attention(settings.attention_backend, teacher.config("transformer"), dtype=dtype, device=task.device)
    return load_recorded_backbone(
        [manifest],
        teacher,
        dtype=dtype,
        batch_rows=settings.batch_size,
        options=options,
        attention_backend=settings.attention_backend,
        device=task.device,
    )


def _checked(student: Path, cache: Cache, settings: CacheScoring, device: torch.device, progress: Progress) -> _Task:
    manifest = cache.manifest
    if settings.closed_loop:
        check_measurable(manifest.sampling.height, manifest.sampling.width)
    steps = settings.steps_on(cache)
    opened = CacheStudent.open(student, cache, device)
    everything = held_out_trajectories(cache)
    if not cache.finished:
        progress.say(
            f"{cache.folder} is not finished: {len(cache)} of its {cache.planned} trajectories are there, and "
            f"{len(everything)} of these are held out: only they are evaluated"
        )
    if remark := text_length_remark(opened.network, manifest.teacher):
        progress.say(remark)
    if manifest.sampling.storage.embeddings == "none":
        progress.say(
            f"no replay floor: {cache.folder} was built with --embeddings none; a cache with --embeddings stored has "
            f"one"
        )
    chosen = [everything[place] for place in spread(everything, settings.count)]
    return _Task(
        cache=cache,
        settings=settings,
        student=opened,
        held_out=len(everything),
        chosen=chosen,
        steps=steps,
        device=device,
        progress=progress,
    )


def _closed(task: _Task, backbone: FluxBackbone, teacher: TeacherFolder) -> ClosedLoop:
    leaders: dict[str, EmbedPrompts] = {"student": task.student.embeddings}
    if task.taught is not None:
        leaders["teacher"] = task.taught
    if task.settings.untrained:
        leaders["untrained"] = task.student.untrained(seed=task.settings.seed).embeddings
    sampling = task.cache.manifest.sampling
    if missing := lpips_missing(sampling.height, sampling.width):
        task.progress.say(missing)
    places = spread(task.chosen, task.settings.closed_loop)
    led = closed_loop(
        task.cache,
        backbone,
        ImageDecoder.load(teacher, recorded_geometry(sampling), device=task.device),
        leaders,
        [task.chosen[place] for place in places],
        lpips=None if missing else Lpips(task.device),
        batch_size=task.settings.batch_size,
        progress=task.progress,
    )
    return ClosedLoop(trajectories=tuple(places), leaders=led)


def _computed(task: _Task, options: MemoryOptions) -> Computed:
    name = torch.cuda.get_device_name(task.device) if task.device.type == "cuda" else task.device.type
    return Computed(
        dtype=task.settings.dtype_of(task.cache.manifest),
        quantize=options.quantize,
        attention=recorded_attention(task.settings.attention_backend),
        device=name,
        batch_size=task.settings.batch_size,
        torch=torch.__version__,
    )


def _remark_on_floor(evaluation: Evaluation, progress: Progress) -> None:
    if evaluation.floor is None:
        return
    values = [value for row in evaluation.floor.error_fraction for value in row]
    mean = sum(values) / len(values)
    if mean > _LARGEST_FLOOR:
        progress.say(
            f"the replay floor is {100 * mean:.1f} % of the velocity's norm, above {100 * _LARGEST_FLOOR:.0f} %: this "
            f"backbone computes otherwise than the recorded one (dtype, quantized weights, attention), and no student "
            f"can come below that here"
        )

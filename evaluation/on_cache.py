"""Evaluates students on held-out trajectories of a cache with its backbone: open loop, and optionally closed loop."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import torch

from secondcast.evaluation.closed_loop import closed_loop
from secondcast.evaluation.held_out import HeldOut, held_out_trajectories, spread
from secondcast.evaluation.open_loop import open_loop
from secondcast.evaluation.pictures.distances import Lpips, lpips_missing
from secondcast.evaluation.replaying import CacheStudent, EmbedPrompts, cached_embeddings
from secondcast.evaluation.results import ClosedLoop, Computed, Evaluated, Evaluation, SampledResult, StepErrors
from secondcast.evaluation.settings.cache_scoring import CacheScoring
from secondcast.evaluation.settings.memory import scoring_cost
from secondcast.models.attention import check_attention, recorded_attention
from secondcast.models.backbone import Backbone
from secondcast.models.cost.placement import place
from secondcast.models.memory.host_memory import free_host_bytes
from secondcast.models.memory.limit import free_bytes
from secondcast.models.memory.meta_run import parameter_count
from secondcast.models.memory.options import AUTO
from secondcast.models.memory.quantized import check_quantizer
from secondcast.models.recorded_backbone import load_recorded_backbone
from secondcast.models.schedule import DTYPES
from secondcast.models.student.tokens import text_length_remark
from secondcast.models.teacher.folder import TeacherFolder
from secondcast.models.teacher.image_decoder import ImageDecoder, load_recorded_decoder
from secondcast.storage_schemas.progress import Progress
from secondcast.storage_schemas.reader import Cache

# By invariant 3, an exact replay of the teacher's embedding differs by at most this fraction of the velocity's norm.
_LARGEST_REPLAY_ERROR = 0.03


@dataclass(kw_only=True, eq=False)
class CacheEvaluator:
    """Evaluates students on the same trajectories, steps and batch size of one cache.

    Whatever does not depend on the student is loaded or computed once, on first use: transformer and VAE, the replay
    error, the samples with the teacher's embedding.
    held_out: number of held-out trajectories of the cache.
    chosen: the evaluated trajectories.
    steps: evaluated steps of each, ascending.
    """

    cache: Cache
    teacher: TeacherFolder
    settings: CacheScoring
    held_out: int
    chosen: Sequence[HeldOut]
    steps: tuple[int, ...]
    device: torch.device
    progress: Progress
    _replay_error: StepErrors | None = None
    _student_parameters: int = 0
    _teacher_result: SampledResult | None = None

    @classmethod
    def open(
        cls, cache: Cache, teacher: TeacherFolder, settings: CacheScoring, *, device: torch.device, progress: Progress
    ) -> Self:
        """Choose the trajectories without loading weights. NotInCacheError, SettingsError, MissingExtraError.

        teacher: provides the transformer, and the VAE for a closed loop.
        """
        settings.check_on(cache)
        everything = held_out_trajectories(cache)
        if not cache.finished:
            progress.say(
                f"{cache.folder} is not finished: {len(cache)} of its {cache.planned} trajectories are committed; only "
                f"the {len(everything)} held-out ones among them are evaluated"
            )
        if cache.manifest.sampling.storage.embeddings == "none":
            progress.say(
                f"no replay error: {cache.folder} was built with --no-store-embeddings; it needs a cache built with "
                f"--store-embeddings"
            )
        return cls(
            cache=cache,
            teacher=teacher,
            settings=settings,
            held_out=len(everything),
            chosen=[everything[place] for place in spread(everything, settings.num_trajectories)],
            steps=settings.steps_on(cache),
            device=device,
            progress=progress,
        )

    def student(self, place: Path) -> CacheStudent:
        """Load the student of a run folder or an export; StudentError unless it matches the cache."""
        student = CacheStudent.open(place, self.cache, self.device)
        self._student_parameters = max(self._student_parameters, parameter_count(student.network))
        return student

    def evaluate(self, place: Path, *, opened: Callable[[Evaluation], None] | None = None) -> Evaluation:
        """Evaluate the student of a run folder or an export.

        opened: receives the evaluation after the open loop, before the closed loop starts.
        Incompatible inputs are refused before backbone weights are loaded: StudentError, TeacherError, SettingsError;
        NonFiniteError.
        """
        student = self.student(place)
        if remark := text_length_remark(student.network, self.cache.manifest.teacher):
            self.progress.say(remark)
        errors = self.open_loop(student)
        evaluation = Evaluation(
            student=str(place),
            student_digest=student.digest,
            errors=errors,
            replay_error=self._replay_error,
            closed_loop=None,
            **self._stated(),
        )
        if opened is not None:
            opened(evaluation)
        if not self.settings.closed_loop:
            return evaluation
        return Evaluation(**{**dict(evaluation), "closed_loop": self.closed_loop(student)})

    def open_loop(self, student: CacheStudent) -> StepErrors:
        """The student's errors; the replay error is computed along with the first student's."""
        encoders: dict[str, EmbedPrompts] = {"student": student.embeddings}
        if self._taught is not None and self._replay_error is None:
            encoders["replay_error"] = self._taught
        found = open_loop(
            self.cache,
            self.backbone,
            encoders,
            self.chosen,
            self.steps,
            batch_size=self.settings.batch_size,
            progress=self.progress,
        )
        if "replay_error" in found:
            self._replay_error = found["replay_error"]
            _remark_on_replay_error(self._replay_error, self.progress)
        return found["student"]

    def closed_loop(self, student: CacheStudent) -> ClosedLoop:
        """Sample with the student and, once for all students, with the teacher's embedding."""
        text_encoders: dict[str, EmbedPrompts] = {"student": student.embeddings}
        if self._taught is not None and self._teacher_result is None:
            text_encoders["teacher"] = self._taught
        if self.settings.random_baseline:
            text_encoders["untrained"] = student.untrained(seed=self.settings.seed).embeddings
        places = spread(self.chosen, self.settings.closed_loop)
        result = closed_loop(
            self.cache,
            self.backbone,
            self._decoder,
            text_encoders,
            [self.chosen[place] for place in places],
            lpips=self._lpips,
            batch_size=self.settings.batch_size,
            progress=self.progress,
        )
        self._teacher_result = result.get("teacher", self._teacher_result)
        teacher = {} if self._teacher_result is None else {"teacher": self._teacher_result}
        return ClosedLoop(trajectories=tuple(places), text_encoders={"student": result["student"]} | teacher | result)

    @cached_property
    def backbone(self) -> Backbone:
        """Load the transformer that the cache was recorded with; see backbone_of."""
        return backbone_of(
            self.cache,
            self.teacher,
            self.settings,
            self.device,
            self.progress,
            student_parameters=self._student_parameters,
        )

    @cached_property
    def _decoder(self) -> ImageDecoder:
        return load_recorded_decoder(self.teacher, self.cache.manifest.sampling, self.device)

    @cached_property
    def _lpips(self) -> Lpips | None:
        sampling = self.cache.manifest.sampling
        if missing := lpips_missing(sampling.height, sampling.width):
            self.progress.say(missing)
            return None
        return Lpips(self.device)

    @cached_property
    def _taught(self) -> EmbedPrompts | None:
        stored = self.cache.manifest.sampling.storage.embeddings == "stored"
        return cached_embeddings(self.cache, self.device) if stored else None

    def _stated(self) -> dict[str, Any]:
        cache = self.cache
        digests, sigmas = cache.manifest.digests(), cache.manifest.sampling.sigmas
        return {
            "created_by": f"secondcast {version('secondcast')}",
            "cache": cache.location,
            "sampling_digest": digests["sampling"],
            "teacher_digest": digests["teacher"],
            "backbone": self.teacher.source,
            "computed": self._computed(),
            "committed": len(cache),
            "held_out": self.held_out,
            "steps": self.steps,
            "sigmas": tuple(sigmas[k] for k in self.steps),
            "trajectories": tuple(
                Evaluated(key=one.key, prompt=one.text, sources=one.sources, guidance=cache.guidance(one.index))
                for one in self.chosen
            ),
        }

    def _computed(self) -> Computed:
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        return Computed(
            dtype=self.settings.dtype_of(self.cache.manifest),
            quantize=self.settings.memory_of(self.cache.manifest).quantize,
            attention=recorded_attention(self.settings.attention_backend),
            device=name,
            batch_size=self.settings.batch_size,
            torch=torch.__version__,
        )


def backbone_of(
    cache: Cache,
    teacher: TeacherFolder,
    settings: CacheScoring,
    device: torch.device,
    progress: Progress,
    *,
    student_parameters: int = 0,
    gradients: bool = False,
    beside_bytes: int = 0,
) -> Backbone:
    """Load the recorded transformer of a cache; TeacherError for another, SettingsError, MissingExtraError.

    student_parameters: of the students on the GPU, for --max-gpu-memory.
    gradients: whether gradients by the embedding are taken; blocks are then recomputed in the backward pass.
    beside_bytes: of tensors that will be on the GPU later, for --max-gpu-memory.
    """
    options, dtype = settings.memory_of(cache.manifest), DTYPES[settings.dtype_of(cache.manifest)]
    if gradients:
        options = options.model_copy(update={"activation_checkpointing": 1})
    check_quantizer(options.quantize)
    check_attention(settings.attention_backend, teacher, dtype=dtype, device=device)
    if settings.max_gpu_memory is not None:
        memory_bytes = free_bytes(settings.max_gpu_memory, device)
        # The students are on the GPU already: what is free is without them.
        counted = 0 if settings.max_gpu_memory == AUTO else student_parameters
        cost = scoring_cost(
            cache.manifest, teacher, settings, student_parameters=counted, gradients=gradients,
            beside_bytes=beside_bytes,
        )  # fmt: skip
        placed = place(cost, options, memory_bytes=memory_bytes, host_bytes=free_host_bytes(), held=settings.held)
        progress.say(placed.text(memory_bytes))
        options = placed.options
    return load_recorded_backbone(
        [cache.manifest],
        teacher,
        dtype=dtype,
        batch_rows=settings.batch_size,
        options=options,
        attention_backend=settings.attention_backend,
        device=device,
    )


def evaluate_on_cache(
    student: Path,
    cache: Cache,
    teacher: TeacherFolder,
    settings: CacheScoring,
    *,
    device: torch.device,
    progress: Progress,
) -> Evaluation:
    """Evaluate one student with its own CacheEvaluator."""
    return CacheEvaluator.open(cache, teacher, settings, device=device, progress=progress).evaluate(student)


def _remark_on_replay_error(replay_error: StepErrors, progress: Progress) -> None:
    values = [value for row in replay_error.error_fraction for value in row]
    mean = sum(values) / len(values)
    if mean > _LARGEST_REPLAY_ERROR:
        progress.say(
            f"the replay error is {100 * mean:.1f} % of the velocity's norm, above "
            f"{100 * _LARGEST_REPLAY_ERROR:.0f} %: this backbone differs from the recorded one (dtype, quantized "
            f"weights, attention), and no student can have a smaller error here"
        )

"""The summary at the end of a run: times of its parts, peak memory, and achieved FLOP/s."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from secondcast.models.cost.matrix_rate import matrix_rate
from secondcast.models.memory.host_memory import host_peak_bytes
from secondcast.models.memory.meta_run import count_flops
from secondcast.models.student.folder import CHECKPOINT_PREFIX, checkpoints
from secondcast.models.student.student import Student
from secondcast.storage_schemas.progress import Progress, counted, duration_text, size_text
from secondcast.trainer.cost.step_flops import step_flops
from secondcast.trainer.data.mixture import TrainingCache
from secondcast.trainer.loop import Trainer
from secondcast.trainer.run.metrics import Metrics
from secondcast.trainer.run.timing import StageTimes
from secondcast.trainer.settings import TrainSettings
from secondcast.trainer.stage import Stage

_PREFIXES = {12: "T", 9: "G", 6: "M", 3: "k", 0: ""}


@dataclass(frozen=True, kw_only=True)
class TrainingPeakMemory:
    """Peak bytes of this process: resident on the host; allocated and reserved on the GPU (None on a CPU)."""

    host_bytes: int
    gpu_bytes: int | None
    gpu_reserved_bytes: int | None

    @classmethod
    def of(cls, device: torch.device) -> "TrainingPeakMemory":
        """The peak so far."""
        on_gpu = device.type == "cuda"
        return cls(
            host_bytes=host_peak_bytes(),
            gpu_bytes=torch.cuda.max_memory_allocated(device) if on_gpu else None,
            gpu_reserved_bytes=torch.cuda.max_memory_reserved(device) if on_gpu else None,
        )

    def line(self) -> str:
        """One line of text."""
        host = f"{size_text(self.host_bytes)} on the host"
        if self.gpu_bytes is None or self.gpu_reserved_bytes is None:
            return f"peak memory: {host}"
        reserved = size_text(self.gpu_reserved_bytes)
        return f"peak memory: {size_text(self.gpu_bytes)} on the GPU ({reserved} reserved), {host}"


@dataclass(frozen=True, kw_only=True)
class Work:
    """FLOPs of a process in an optimizer step of a stage.

    matrix_flops: FLOP/s of matrix products of `dtype` on this machine; None if not measured.
    """

    flops: float
    matrix_flops: float | None = None
    dtype: str | None = None

    def part_of_rate(self, seconds: float) -> float | None:
        """The fraction of the matrix rate that a step of this duration reaches."""
        return self.flops / seconds / self.matrix_flops if self.matrix_flops else None

    def text(self, seconds: float) -> str:
        """One line of text."""
        achieved = f"{flops_text(self.flops)} per step, {flops_text(self.flops / seconds)}/s"
        part = self.part_of_rate(seconds)
        if part is None or self.matrix_flops is None:
            return achieved
        reference = f"{flops_text(self.matrix_flops)}/s of {self.dtype} matrix products on this machine"
        return f"{achieved}: {100 * part:.0f} % of the {reference}"


@contextmanager
def summarized(
    trainer: Trainer,
    training_caches: Sequence[TrainingCache],
    metrics: Metrics | None,
    progress: Progress,
    *,
    counted_from_seconds: float = 10.0,
) -> Iterator[None]:
    """A context around the steps of a run that prints the summary at the end and logs it as metrics.

    Counting FLOPs takes seconds, so it is skipped if all steps together took less than counted_from_seconds. After an
    interrupt only times and memory are printed. Only the first process, which has the metrics, reports. Without steps
    nothing is printed.
    """
    try:
        yield
    except KeyboardInterrupt:
        _say_times(trainer, TrainingPeakMemory.of(trainer.device), progress)
        kept = [folder.name.removeprefix(CHECKPOINT_PREFIX).lstrip("0") for folder in checkpoints(trainer.run)]
        last = f"the last checkpoint is of step {kept[-1]}" if kept else "there is no checkpoint yet"
        progress.say(f"stopped after step {trainer.done} of {trainer.settings.total_steps}; {last}")
        raise
    times = trainer.clock.times()
    if metrics is None or not times:
        return
    # Taken before the measurements below, which allocate memory.
    peak = TrainingPeakMemory.of(trainer.device)
    _say_times(trainer, peak, progress)
    lasted = sum(of_stage.steps * of_stage.step_seconds for of_stage in times.values())
    works = _works(trainer, training_caches, times) if lasted >= counted_from_seconds else {}
    for name, work in works.items():
        progress.say(f"stage {name}: {work.text(times[name].step_seconds)}")
    # Logged at the last step, so that resuming keeps it.
    facts = summary(trainer.settings, times, works, peak, trainer.clock.beside_seconds)
    metrics.log(step=trainer.done - 1, summary=facts)


def _say_times(trainer: Trainer, peak: TrainingPeakMemory, progress: Progress) -> None:
    times = trainer.clock.times()
    for name, of_stage in times.items():
        progress.say(times_line(_stage(trainer.settings, name), of_stage, trainer.processes.ranks))
    if trainer.clock.beside_seconds:
        progress.say(f"validation, checkpoints and samples: {_seconds_text(trainer.clock.beside_seconds)}")
    if times:
        progress.say(peak.line())


def times_line(stage: Stage, times: StageTimes, ranks: int = 1) -> str:
    """A line such as: stage main (vision), mean of 98 steps: 812 ms, 4.9 samples/s; data wait 3.1 ms (0 %), ..."""
    whole = times.step_seconds
    parts = [
        f"{part.replace('_', ' ')} {_ms(seconds)} ({100 * seconds / whole:.0f} %)"
        for part, seconds in times.seconds.items()
    ]
    where = f" in the first of {ranks} processes" if ranks > 1 else ""
    return (
        f"stage {stage.name} ({stage.loss}), mean of {counted(times.steps, 'step')}{where}: {_ms(whole)}, "
        f"{stage.batch_size / whole:.3g} samples/s; {', '.join(parts)}"
    )


def summary(
    settings: TrainSettings,
    times: Mapping[str, StageTimes],
    works: Mapping[str, Work],
    peak: TrainingPeakMemory,
    beside_seconds: float,
) -> dict[str, Any]:
    """The summary as plain JSON types; keys end in their unit."""
    return {
        "stages": {name: _stage_facts(_stage(settings, name), one, works.get(name)) for name, one in times.items()},
        "validation_and_checkpoints_seconds": round(beside_seconds, 3),
        "peak_host_bytes": peak.host_bytes,
        "peak_gpu_bytes": peak.gpu_bytes,
        "peak_gpu_reserved_bytes": peak.gpu_reserved_bytes,
    }


def _stage_facts(stage: Stage, times: StageTimes, work: Work | None) -> dict[str, Any]:
    return {
        "loss": stage.loss,
        "timed_steps": times.steps,
        "step_seconds": round(times.step_seconds, 6),
        **{f"{part}_seconds": round(seconds, 6) for part, seconds in times.seconds.items()},
        "samples_per_second": stage.batch_size / times.step_seconds,
        "step_flop": None if work is None else work.flops,
        "matrix_flop_per_second": None if work is None else work.matrix_flops,
        "part_of_matrix_rate": None if work is None else work.part_of_rate(times.step_seconds),
    }


def _works(
    trainer: Trainer, training_caches: Sequence[TrainingCache], times: Mapping[str, StageTimes]
) -> dict[str, Work]:
    student = trainer.train_state.plain_student
    of_student = student_forward_flops(student)
    counts = [len(source.indices) for source in trainer.dataset.sources]
    caches = {
        training_cache.name: (training_cache.cache.manifest, count)
        for training_cache, count in zip(training_caches, counts, strict=True)
    }
    works = {}
    for stage in (_stage(trainer.settings, name) for name in times):
        flops = step_flops(
            stage,
            trainer.settings.memory,
            caches,
            student_flops=of_student,
            text_length=student.config.text_length,
            loaded_blocks=trainer.settings.loaded_blocks,
        )
        flops /= trainer.processes.ranks
        rate: dict[str, Any] = {}
        if stage.replays:
            dtype = trainer.objective.backbones[0].dtype
            rate = {"matrix_flops": matrix_rate(trainer.device, dtype) or None, "dtype": str(dtype).split(".")[-1]}
        works[stage.name] = Work(flops=flops, **rate)
    return works


def _stage(settings: TrainSettings, name: str) -> Stage:
    return next(stage for stage in settings.stages if stage.name == name)


def _seconds_text(seconds: float) -> str:
    return duration_text(seconds) if seconds >= 10 else f"{seconds:.2g} s"


def _ms(seconds: float) -> str:
    milliseconds = 1000 * seconds
    return f"{milliseconds:,.0f} ms" if milliseconds >= 100 else f"{milliseconds:.3g} ms"


def flops_text(flops: float) -> str:
    """FLOPs with a unit prefix: 31.4 TFLOP."""
    power = next(power for power in _PREFIXES if flops >= 10**power or not power)
    value = flops / 10**power
    return f"{value:,.0f} {_PREFIXES[power]}FLOP" if value >= 1000 else f"{value:.3g} {_PREFIXES[power]}FLOP"


@torch.no_grad()
def student_forward_flops(student: Student) -> float:
    """FLOPs of a student's forward pass of one text of its length; it is run once."""
    # Not on the meta device: most encoders of transformers look at the values of their mask.
    token_ids_BT = torch.zeros(1, student.config.text_length, dtype=torch.int64, device=student.device)
    return count_flops(lambda: student(token_ids_BT)).total

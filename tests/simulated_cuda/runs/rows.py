"""What is simulated: parts of commands with FLUX.1-dev, and the GPU memory that the product calculates for each.

Calculate before torch has the simulated device: the calculation counts on the meta device, with the kernels of a CPU.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Self

from secondcast.cache_builder.opening.new_manifest import outline_manifest
from secondcast.cache_builder.settings import PlannedBuild
from secondcast.evaluation.pictures.folder import PictureSettings
from secondcast.evaluation.settings.cache_scoring import CacheScoring
from secondcast.evaluation.settings.memory import sampling_cost, scoring_cost
from secondcast.models.cost.cards import CARDS
from secondcast.models.cost.counted import student_cost, text_encoder_cost
from secondcast.models.cost.gpu_memory import GpuMemory, text_stage_memory
from secondcast.models.cost.placement import sample_stage_cost
from secondcast.models.memory.options import PLAIN, MemoryOptions
from secondcast.models.schedule import DTYPES
from secondcast.models.teacher.planned import planned_teacher
from secondcast.storage_schemas.schema.manifest import Manifest
from secondcast.trainer.cost.stage_cost import Costs, costs_of
from secondcast.trainer.settings import TrainFlags, TrainSettings

GIB = 2**30
# Of the memory of a GPU, for CUDA itself: assumed.
CONTEXT_GIB = 0.5
TEACHER = planned_teacher("FLUX.1-dev")[0]
STUDENT = "base"
GUIDANCE = 3.5
# Of a sampled trajectory: all steps need the same memory, but for the latents that are kept.
STEPS = 2
_ON_GPU = MemoryOptions(modulation="gpu")
_SCORING = CacheScoring(num_trajectories=2, closed_loop=1, batch_size=4)


@dataclass(frozen=True, kw_only=True)
class Planned:
    """Calculated memory without that of CUDA itself, and the smallest GPU that the plan fits into."""

    gib: float
    activations_gib: float
    card: str
    card_gib: float

    @classmethod
    def of(cls, memory: GpuMemory) -> Self:
        """Of a calculation."""
        cards = [card for card in CARDS if memory.needed_bytes <= card.memory_gib * GIB]
        card = min(cards, key=lambda card: card.memory_gib)
        return cls(
            gib=(memory.total_bytes - memory.cuda_bytes) / GIB,
            activations_gib=memory.activations_bytes / GIB,
            card=card.name,
            card_gib=card.memory_gib,
        )


class Row(ABC):
    """A run of its own."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Command and options."""

    @abstractmethod
    def memory(self) -> GpuMemory:
        """As calculated by the product."""

    def planned(self) -> Planned:
        """See Planned."""
        return Planned.of(self.memory())


def manifest_of(pixels: int, *, prompts: int = 4, **options: Any) -> Manifest:
    """A cache of FLUX.1-dev as `secondcast build` plans it."""
    return outline_manifest(PlannedBuild(resolution=pixels, **options), TEACHER, prompt_count=prompts)


def sampled_manifest(pixels: int, prompts: int) -> Manifest:
    """A cache of short trajectories in one shard."""
    return manifest_of(pixels, prompts=prompts, steps=STEPS, shard_size=prompts)


@dataclass(frozen=True, kw_only=True)
class TrainingRow(Row):
    """An optimizer step; options that are not given are the defaults of `secondcast train`, at batch size 4."""

    pixels: int = 512
    flags: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The options in the order of the flags."""
        flags = [f"`--{name.replace('_', '-')} {value}`" for name, value in self.flags.items()]
        return " ".join([f"train, {self.pixels} px", *flags])

    @property
    def settings(self) -> TrainSettings:
        """Settings of one step."""
        return TrainFlags.from_flags(student=STUDENT, steps=1, **{"batch_size": 4, **self.flags}).settings()

    def memory(self) -> GpuMemory:
        """See Row."""
        return _training_costs(self.pixels).memory(self.settings)


@cache
def _training_costs(pixels: int) -> Costs:
    return costs_of({"cache": manifest_of(pixels)}, STUDENT)


@dataclass(frozen=True, kw_only=True)
class TextRow(Row):
    """Two batches of the text stage."""

    batch_size: int = 16

    @property
    def name(self) -> str:
        """See Row."""
        return f"build, text stage, batch {self.batch_size}"

    @property
    def manifest(self) -> Manifest:
        """A cache of two batches."""
        return sampled_manifest(512, 2 * self.batch_size)

    def memory(self) -> GpuMemory:
        """See Row."""
        itemsize = DTYPES[self.manifest.sampling.dtype].itemsize
        cost = text_encoder_cost(self.manifest)
        return text_stage_memory(cost, dtype_bytes=itemsize, batch_size=self.batch_size)


@dataclass(frozen=True, kw_only=True)
class BuildRow(Row):
    """A shard of two batches of the sample stage."""

    pixels: int
    batch_size: int = 16
    options: MemoryOptions = _ON_GPU

    @property
    def name(self) -> str:
        """See Row."""
        return f"build, sample stage, {self.pixels} px, batch {self.batch_size}"

    @property
    def manifest(self) -> Manifest:
        """A cache of two batches."""
        return sampled_manifest(self.pixels, 2 * self.batch_size)

    def memory(self) -> GpuMemory:
        """See Row."""
        return sample_stage_cost(self.manifest, self.batch_size).memory(self.options)


@dataclass(frozen=True, kw_only=True)
class EvaluateRow(Row):
    """Open loop on a cache, of a student and of the teacher's embeddings, and closed loop of the student."""

    pixels: int
    scoring: CacheScoring = _SCORING

    @property
    def name(self) -> str:
        """See Row."""
        return f"evaluate, {self.pixels} px, batch {self.scoring.batch_size}"

    @property
    def manifest(self) -> Manifest:
        """The cache."""
        return sampled_manifest(self.pixels, self.scoring.num_trajectories)

    def memory(self) -> GpuMemory:
        """See Row."""
        parameters = student_cost(STUDENT, self.manifest).parameters
        return scoring_cost(self.manifest, TEACHER, self.scoring, student_parameters=parameters).memory(PLAIN)


@dataclass(frozen=True, kw_only=True)
class GenerateRow(Row):
    """A batch of images of a student."""

    pixels: int
    batch_size: int

    @property
    def name(self) -> str:
        """See Row."""
        return f"generate, {self.pixels} px, batch {self.batch_size}"

    @property
    def manifest(self) -> Manifest:
        """A cache with the schedule and the size of the images."""
        return sampled_manifest(self.pixels, self.batch_size)

    def memory(self) -> GpuMemory:
        """See Row."""
        settings = PictureSettings(
            student=STUDENT,
            teacher="FLUX.1-dev",
            text_length=self.manifest.teacher.text_length,
            height=self.pixels,
            width=self.pixels,
            steps=STEPS,
            schedule="diffusers",
            guidance=GUIDANCE,
            seed=0,
            dtype="bfloat16",
            pooled="zero",
        )
        parameters = student_cost(STUDENT, self.manifest).parameters
        cost = sampling_cost(settings, TEACHER, batch_size=self.batch_size, student_parameters=parameters)
        return cost.memory(PLAIN)


_RECOMPUTED = {"activation_checkpointing": 1}
ROWS: dict[str, tuple[Row, ...]] = {
    # Of each process. Rows that share a transformer follow each other.
    "training": (
        TrainingRow(),
        TrainingRow(flags=_RECOMPUTED),
        TrainingRow(flags=_RECOMPUTED | {"batch_size": 1}),
        TrainingRow(pixels=1024, flags=_RECOMPUTED),
        TrainingRow(pixels=1024, flags={"activation_checkpointing": 4}),
        TrainingRow(flags={"modulation": "gpu"}),
    ),
    "streaming": (
        TrainingRow(flags=_RECOMPUTED | {"gpu_blocks": 28}),
        TrainingRow(flags=_RECOMPUTED | {"gpu_blocks": 0}),
        TrainingRow(pixels=1024, flags=_RECOMPUTED | {"gpu_blocks": 0, "grad_accum_steps": 2}),
        TrainingRow(flags=_RECOMPUTED | {"quantize": "int8"}),
    ),
    "sampling": (
        TextRow(),
        BuildRow(pixels=512),
        BuildRow(pixels=1024),
        EvaluateRow(pixels=512),
        GenerateRow(pixels=512, batch_size=4),
        GenerateRow(pixels=1024, batch_size=1),
    ),
}
"""Rows by the process that runs them."""
BROKEN = TrainingRow()
"""The row that is run with faults as well."""
HOST_INPUT, READ_AND_ACTIVATIONS = "host input", "host read and activations"
"""The faults."""

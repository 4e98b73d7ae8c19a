"""Which rows full_scale.py has, in which order, and what is calculated of each: memory, FLOPs, how long it takes."""

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from benchmarks.full_scale_modes import MODES, ONLINE
from benchmarks.full_scale_rows import GIB
from benchmarks.random_teacher import SCALES, Scale, Shape
from secondcast.models.cost.cards import COPY_BYTES_PER_SECOND
from secondcast.models.cost.counted import backbone_cost, student_cost, text_encoder_cost
from secondcast.models.cost.gpu_memory import CUDA_BYTES, GpuMemory, held_weights, table_rows, training_memory
from secondcast.models.cost.network_costs import BackboneCost, TextEncoderCost
from secondcast.models.cost.shapes import CallShapes
from secondcast.models.schedule import DTYPES
from secondcast.storage_schemas.schema.manifest import Manifest

# Of the matrix rate, for the estimate alone: 310 TFLOP/s were published for eager FLUX on an H100.
_STEP_PART = 0.4
# Assumed, for the estimate alone: random weights are made there, or taken to the host and back.
_DEVICE_BYTES_PER_SECOND, _HOST_BYTES_PER_SECOND = 10e9, 2e9
_ROW_SECONDS, _START_SECONDS = 2.0, 45.0
# Three graphs with a backward pass. Online two more without one, for the teacher. Streamed the first three are there,
# from the mode before, and two of the forward pass alone are not.
_COMPILING_SECONDS = {"online": 60.0, "streamed": 30.0, "": 45.0}
# As --max-gpu-memory has it (trainer/cost/fitting.py): activations that are not counted on the meta device.
_UNSEEN = 0.04


class Place(NamedTuple):
    """What a row is measured on."""

    shape: Shape
    batch_size: int


@dataclass(frozen=True, kw_only=True)
class Group:
    """Rows for which the transformer is prepared once; with a cap under it, from the host's memory as `load` does."""

    mode: str
    places: tuple[Place, ...]
    cap_gib: float | None = None
    small_student: bool = False

    def student(self, scale: Scale) -> str:
        """Source of the student's configuration."""
        return scale.small_student if self.small_student else scale.student

    @property
    def from_host(self) -> bool:
        """Whether the weights lie on the host before."""
        return self.cap_gib is not None or MODES[self.mode].streams


def _full() -> Iterable[Group]:
    short, long, large = SCALES["full"].shapes
    main, alone, long_main, long_alone = Place(short, 4), Place(short, 1), Place(long, 4), Place(long, 1)
    pixels = Place(large, 1)
    yield Group(mode="online", places=(main, alone))
    yield Group(mode="plain", places=(main, alone))
    yield Group(mode="online+checkpointed", places=(main, alone, long_main, long_alone, pixels))
    yield Group(mode="checkpointed", places=(main,))
    yield Group(mode="online+checkpointed+compiled", places=(main,))
    yield Group(mode="table+checkpointed+compiled", places=(main,))
    yield Group(mode="table+checkpointed", cap_gib=23.0, places=(main, alone, long_alone, pixels))
    yield Group(mode="table+streamed", cap_gib=23.0, places=(long_main,))
    yield Group(mode="table+streamed", cap_gib=15.0, places=(main,))
    yield Group(mode="table+streamed", cap_gib=11.0, places=(main,))
    yield Group(mode="int8", cap_gib=15.0, places=(main, pixels))
    yield Group(mode="nf4", cap_gib=11.0, places=(main,))
    yield Group(mode="nf4", cap_gib=7.5, places=(alone,), small_student=True)
    yield Group(mode="fp8", cap_gib=15.0, places=(main,))
    yield Group(mode="table+streamed+compiled", cap_gib=15.0, places=(main,))
    yield Group(mode="table", places=(main,))
    yield Group(mode="online", places=(pixels,))
    yield Group(mode="plain", places=(pixels,))
    yield Group(mode="fsdp2", places=(main,))
    yield Group(mode="streamed", places=(main,))


def _tiny() -> Iterable[Group]:
    scale = SCALES["tiny"]
    places = tuple(Place(shape, size) for shape in scale.shapes for size in reversed(scale.batch_sizes))
    for mode, held in MODES.items():
        # To trace the blocks for a shape takes seconds.
        yield Group(mode=mode, places=places[:1] if held.options.compile else places)
    yield Group(mode="nf4", places=places[-1:], small_student=True)


def plan(name: str, *, modes: Collection[str], shapes: Collection[str], caps: Collection[float]) -> list[Group]:
    """The groups of a scale, the most important first, of these modes, shapes and caps; online ones before others."""
    chosen = []
    for group in _full() if name == "full" else _tiny():
        places = tuple(place for place in group.places if place.shape.name in shapes)
        if places and group.mode in modes and (group.cap_gib is None or group.cap_gib in caps):
            one = Group(mode=group.mode, places=places, cap_gib=group.cap_gib, small_student=group.small_student)
            chosen.append(one)
    return chosen


class Calculated:
    """What is calculated of the rows of a group, from configurations alone."""

    def __init__(self, scale: Scale, group: Group, *, steps: int) -> None:
        self.scale, self.group, self.steps, self.mode = scale, group, steps, MODES[group.mode]
        self._manifests = {place: scale.manifest(place.shape, steps=steps) for place in group.places}
        self._dtype_bytes = DTYPES[scale.dtype].itemsize
        self.resident = self._resident() if self.mode.streams else None

    def memory(self, place: Place, resident: int | None) -> GpuMemory:
        """Of training alone, without what the online loop has beside it."""
        backbone, _, student = self._costs(place)
        return training_memory(
            backbone,
            student,
            options=self.mode.with_resident(resident),
            dtype_bytes=self._dtype_bytes,
            batch_size=place.batch_size,
            table_rows=table_rows(*self._manifests.values()),
        )

    def peak_gib(self, place: Place) -> float:
        """What the process allocates on the GPU at most; CUDA's own is no part of it. NaN for FSDP2."""
        if self.mode.fsdp2:
            return math.nan
        _, text_encoder, _ = self._costs(place)
        beside = text_encoder.parameters * self._dtype_bytes if self.group.mode in ONLINE else 0
        return (self.memory(place, self.resident).total_bytes - CUDA_BYTES + beside) / GIB

    def step_flops(self, place: Place) -> float:
        """Of an optimizer step, what is computed again among them."""
        backbone, text_encoder, student = self._costs(place)
        flops = backbone.training_flops(self.mode.with_resident(self.resident)) + 3 * student.forward_flops
        if self.group.mode in ONLINE:
            flops += backbone.forward_flops + text_encoder.forward_flops
        return place.batch_size * flops

    def preparing_seconds(self) -> float:
        """Estimated: random weights, and their way to where they are held."""
        rate = _HOST_BYTES_PER_SECOND if self.group.from_host or self.mode.fsdp2 else _DEVICE_BYTES_PER_SECOND
        return self._costs(self.group.places[0])[0].parameters * self._dtype_bytes / rate

    def row_seconds(self, place: Place, matrix_rate: float) -> float:
        """Estimated, compiling it among them."""
        compiling = 0.0
        if self.mode.options.compile and self.scale.compiler == "inductor":
            kind = "online" if self.group.mode in ONLINE else "streamed" if self.mode.streams else ""
            compiling = _COMPILING_SECONDS[kind]
        copied = 0.0
        if self.mode.streams or self.mode.fsdp2:
            # In the forward and in the backward pass.
            copied = 2 * self._host_bytes(place) / COPY_BYTES_PER_SECOND
        computed = self.step_flops(place) / (_STEP_PART * matrix_rate)
        return _ROW_SECONDS + compiling + self.steps * max(copied, computed)

    def _host_bytes(self, place: Place) -> int:
        backbone = self._costs(place)[0]
        if self.mode.fsdp2:
            return backbone.parameters * self._dtype_bytes
        options, rows = self.mode.with_resident(self.resident), table_rows(*self._manifests.values())
        return held_weights(backbone, options, dtype_bytes=self._dtype_bytes, table_rows=rows).pinned_bytes

    def _resident(self) -> int:
        """As many blocks as --max-gpu-memory would leave on a card of so much memory; none where there is no cap."""
        if self.group.cap_gib is None:
            return 0
        for resident in range(self._costs(self.group.places[0])[0].blocks, 0, -1):
            memories = [self.memory(place, resident) for place in self.group.places]
            if all(m.total_bytes + _UNSEEN * m.activations_bytes <= self.group.cap_gib * GIB for m in memories):
                return resident
        return 0

    def _costs(self, place: Place) -> tuple[BackboneCost, TextEncoderCost, TextEncoderCost]:
        return _costs(self.group.student(self.scale), self._manifests[place].model_dump_json())


def estimated_seconds(scale: Scale, groups: Sequence[Group], *, steps: int, matrix_rate: float) -> float:
    """Of all rows, and of the caches before them."""
    total = _START_SECONDS
    for group in groups:
        calculated = Calculated(scale, group, steps=steps)
        total += calculated.preparing_seconds()
        total += sum(calculated.row_seconds(place, matrix_rate) for place in group.places)
    return total


@cache
def _costs(student: str, manifest_json: str) -> tuple[BackboneCost, TextEncoderCost, TextEncoderCost]:
    manifest = Manifest.model_validate_json(manifest_json)
    return backbone_cost(CallShapes.of(manifest)), text_encoder_cost(manifest), student_cost(student, manifest)

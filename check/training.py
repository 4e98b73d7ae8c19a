"""Rows of training: offline as online, every memory mode as the plain one; times, and memory against the plan."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import torch

from secondcast.check.machine import with_memory
from secondcast.check.results import CheckRow
from secondcast.check.steps import Steps, Training
from secondcast.check.teachers import CheckTeacher
from secondcast.models.backbone import Backbone
from secondcast.models.cost.gpu_memory import GpuMemory
from secondcast.models.device import deterministic_algorithms, total_bytes
from secondcast.models.memory.compiling import check_compiler
from secondcast.models.memory.optional_packages import QUANTIZERS
from secondcast.models.memory.options import MemoryOptions
from secondcast.models.memory.peak import begin_peak, release_memory
from secondcast.models.memory.quantized import check_quantizer
from secondcast.storage_schemas.errors import SettingsError
from secondcast.storage_schemas.progress import counted, size_text
from secondcast.trainer.cost.stage_cost import Costs, costs_of

ONLINE = "offline step"
"""The name of the row that compares with the online loop."""
# Steps whose numbers are compared; of a timed row the first ones allocate, compile, and wait for their batch.
_COMPARED, _WARM = 3, 2
ASSUMED_RATE_FRACTION = 0.3
"""Of the matrix rate, to estimate how long a row takes."""
# On a GPU the numbers of two ways to compute may differ by rounding: half a unit of bf16's eight bits, of the mean of
# many values, and of a gradient that has passed all blocks. A way that is wrong is off by far more (measured on the
# pocket: a lost gradient 0.3 and more).
_LOSS_ROUNDING, _GRADIENT_ROUNDING = 2**-9, 2**-5


@dataclass(frozen=True, kw_only=True)
class Mode:
    """A way to hold the transformer in training. exact: whether its results are those of the plain one."""

    name: str
    options: MemoryOptions
    exact: bool = True


def modes(blocks: int, *, table: bool) -> list[Mode]:
    """All modes of training, the exact ones first.

    blocks: number of the transformer's blocks. table: whether a modulation table is possible.
    """
    recomputed: dict[str, Any] = {"modulation": "precomputed" if table else "gpu", "activation_checkpointing": 1}
    exact: dict[str, dict[str, Any]] = {
        "plain": {"modulation": "gpu"},
        "modulation table": {"modulation": "precomputed"},
        "blocks recomputed": {"modulation": "gpu", "activation_checkpointing": 1},
        "every second block recomputed": {"modulation": "gpu", "activation_checkpointing": 2},
        "table, blocks recomputed": recomputed,
        "table, half of the blocks streamed": {"modulation": "precomputed", "gpu_blocks": blocks // 2},
        "all blocks streamed": {"modulation": "gpu", "gpu_blocks": 0},
    }
    if not table:
        exact = {name: options for name, options in exact.items() if "table" not in name}
    rounded: dict[str, dict[str, Any]] = {
        "compiled": recomputed | {"compile": True},
        **{kind: recomputed | {"quantize": kind} for kind in QUANTIZERS},
    }
    return [
        *(Mode(name=name, options=MemoryOptions(**options)) for name, options in exact.items()),
        *(Mode(name=name, options=MemoryOptions(**options), exact=False) for name, options in rounded.items()),
    ]


class TrainingRows:
    """The rows of training. teacher, folder: see Training.

    matrix_rate: FLOP/s of matrix products in the teacher's dtype.
    """

    def __init__(self, teacher: CheckTeacher, folder: Path, *, matrix_rate: float) -> None:
        self._training, self._teacher, self._rate = Training(teacher, folder), teacher, matrix_rate
        self._device = teacher.device
        self._steps: Steps | None = None

    @property
    def _on_gpu(self) -> bool:
        return self._device.type == "cuda"

    @cached_property
    def costs(self) -> Costs:
        """The planned costs of training on the cache."""
        return costs_of(
            {"cache": self._teacher.planned[0]},
            self._training.student_source,
            gpu_bytes=total_bytes(self._device),
        )

    def online(self) -> CheckRow:
        """Steps from the cache against the loop that computes everything at once."""
        claim = "steps from the cache are those of the online loop: losses, gradient, weights"
        online = self._training.online(_COMPARED)
        release_memory(self._device)
        return _compared(ONLINE, claim, self._expected(), online, rounded=self._on_gpu)

    def online_seconds(self) -> float:
        """The time of that row, estimated without loading."""
        # Beside the student's steps the teacher's predictions, in all less than as much again.
        return 2 * 2 * _COMPARED * self._flops(self._first) / (ASSUMED_RATE_FRACTION * self._rate)

    def names(self, mode: Mode) -> tuple[str, ...]:
        """Names of a mode's rows."""
        name = f"train: {mode.name}"
        return ("replay error", name) if mode == self._first else (name,)

    def seconds(self, mode: Mode) -> float:
        """The time of a mode's row, estimated without loading."""
        steps = _COMPARED + self._teacher.scale.training_steps
        return steps * self._flops(mode) / (ASSUMED_RATE_FRACTION * self._rate)

    def mode(self, mode: Mode) -> Iterator[CheckRow]:
        """A mode: its numbers against those of the first one, its time and memory; of the first the replay error too.

        Raises SettingsError for one that cannot be run here.
        """
        name = self.names(mode)[-1]
        if mode.options.compile:
            if self._device.type != "cuda":
                raise SettingsError("on a CPU compiling takes longer than it saves")
            check_compiler(self._device)
        if why := self._why_not(mode):
            raise SettingsError(why)
        check_quantizer(mode.options.quantize)
        if mode != self._first:
            # Before another transformer is on the device.
            self._expected()
            release_memory(self._device)
        backbone = self._teacher.backbone(mode.options)
        if mode == self._first:
            yield self._replay_error(backbone)
        with deterministic_algorithms(mode.exact):
            compared = self._training.offline(backbone, _COMPARED, mode.options)
        row = self._numbers(name, mode, compared)
        steps = self._teacher.scale.training_steps
        begin_peak(self._device)
        taken = self._training.offline(backbone, steps, mode.options)
        seconds = median(taken.seconds[_WARM:])
        fraction = self._flops(mode) / seconds / self._rate
        row = row.model_copy(update={"step_seconds": seconds, "matrix_rate_fraction": fraction})
        yield with_memory(row, self._device, self._planned(mode))
        if mode.options.compile:
            # What is compiled holds the blocks.
            torch._dynamo.reset()

    def _numbers(self, name: str, mode: Mode, steps: Steps) -> CheckRow:
        if mode == self._first:
            self._steps = steps
            return CheckRow(name=name, claim="time and memory of a step", result="measured")
        if mode.exact:
            claim = f"losses, gradient and weights of the mode {self._first.name}"
            reordered = mode.options.gpu_blocks is not None and self._teacher.folder.family.anatomy.cross_attention
            return _compared(name, claim, steps, self._expected(), rounded=self._on_gpu or reordered)
        loss, gradient = steps.differences(self._expected())
        detail = f"losses differ by {loss:.1e}, the gradient by {gradient:.1e}"
        return CheckRow(name=name, claim="time and memory; results are rounded", result="measured", detail=detail)

    @cached_property
    def _first(self) -> Mode:
        """The first mode that fits by plan: the others are compared with it."""
        exact = [mode for mode in modes(self.costs.blocks, table=self._teacher.has_table) if mode.exact]
        return next((mode for mode in exact if self._why_not(mode) is None), exact[-1])

    def _expected(self) -> Steps:
        """The steps of the first mode."""
        if self._steps is None:
            backbone = self._teacher.backbone(self._first.options)
            with deterministic_algorithms():
                self._steps = self._training.offline(backbone, _COMPARED, self._first.options)
        return self._steps

    def _replay_error(self, backbone: Backbone) -> CheckRow:
        settings = self._training.settings(_COMPARED, self._first.options)
        replay_error = self._training.trainer(backbone, settings).measure_replay_error()
        return CheckRow(
            name="replay error",
            claim="vision loss of the teacher's own embedding, which a perfect student has",
            result="measured",
            detail=f"{replay_error.error:.3g}, on {counted(settings.replay_check, 'record')}",
        )

    def _planned(self, mode: Mode) -> GpuMemory:
        return self.costs.memory(self._training.settings(_COMPARED, mode.options))

    def _flops(self, mode: Mode) -> float:
        settings = self._training.settings(_COMPARED, mode.options)
        return self.costs.step_flops(settings, settings.stages[0])

    def _why_not(self, mode: Mode) -> str | None:
        """Why a mode does not fit into the GPU by plan; None if it does, or on a CPU."""
        needed, gpu_bytes = self._planned(mode).needed_bytes, total_bytes(self._device)
        if gpu_bytes is None or needed <= gpu_bytes:
            return None
        return f"needs {size_text(int(needed))} by calculation, this GPU has {size_text(gpu_bytes)}"


def _compared(name: str, claim: str, steps: Steps, expected: Steps, *, rounded: bool) -> CheckRow:
    """rounded: whether sums may be in another order."""
    if steps.equals(expected):
        detail = f"bit for bit, {counted(len(steps.losses), 'step')}"
        return CheckRow(name=name, claim=claim, result="holds", detail=detail)
    loss, gradient = steps.differences(expected)
    within = rounded and loss <= _LOSS_ROUNDING and gradient <= _GRADIENT_ROUNDING
    detail = f"losses differ by {loss:.1e}, the gradient by {gradient:.1e}" + (", rounding" if within else "")
    return CheckRow(name=name, claim=claim, result="holds" if within else "broken", detail=detail)

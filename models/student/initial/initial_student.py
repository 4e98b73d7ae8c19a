"""Make an initial student out of a teacher's own text encoder, before any training."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import T5EncoderModel

from secondcast.models.memory.meta_run import parameter_count
from secondcast.models.student.initial.cut import Cutter, choose, layer_starts
from secondcast.models.student.initial.encoder_weights import EncoderWeights, check_gated
from secondcast.models.student.initial.projection import context_error, fit_projection
from secondcast.models.student.initial.search import Parts, Readout, best_by_swaps
from secondcast.models.student.initial.settings import Kind
from secondcast.models.student.initial.size import Size
from secondcast.models.student.initial.statistics import Pairs, Sums, chunks_of, collect
from secondcast.models.student.initial.work_folder import WorkFolder
from secondcast.models.student.student import new_student
from secondcast.models.student.student_network import SecondcastStudent, StudentConfig
from secondcast.storage_schemas.errors import PromptsError, StudentError
from secondcast.storage_schemas.progress import Progress, counted, size_text
from secondcast.storage_schemas.schema.manifest import Teacher

SEARCH_PROMPTS = 256
"""Prompts on which a choice of layers and heads is fitted."""


@dataclass(frozen=True, kw_only=True)
class TeacherEncoder:
    """What an initial student is made of.

    load: loads the encoder for one pass over the prompts.
    weights: its tensors on disk.
    context_ID: the transformer's text projection, fp32, on the device of all computation.
    """

    identity: Teacher
    load: Callable[[], T5EncoderModel]
    weights: EncoderWeights
    context_ID: torch.Tensor

    @property
    def size(self) -> Size:
        """The size of the encoder."""
        return Size.of_teacher(self.weights.config)


@dataclass(frozen=True, kw_only=True)
class TokenIds:
    """Padded token ids: fitted_NT for statistics and regressions, held_NT for the context error."""

    fitted_NT: torch.Tensor
    held_NT: torch.Tensor

    def check_enough(self, width: int, pad_token_id: int) -> None:
        """Raise PromptsError for fewer tokens than the student's width."""
        tokens = int((self.fitted_NT != pad_token_id).sum())
        if tokens < width:
            raise PromptsError(
                f"the {counted(len(self.fitted_NT), 'prompt')} for the statistics have {counted(tokens, 'token')}, "
                f"expected at least {width}, the width of the student: give more or longer prompts, or a smaller --size"
            )


@dataclass(frozen=True, kw_only=True)
class Initial:
    """An initial student and its context error on held-out prompts."""

    kind: Kind
    student: SecondcastStudent
    parts: str
    error: float

    @property
    def facts(self) -> dict[str, Any]:
        """What is recorded about it."""
        count = parameter_count(self.student)
        return {"kind": self.kind, "parts": self.parts, "parameters": count, "bytes": 4 * count} | {
            "context_error": self.error
        }

    @property
    def text(self) -> str:
        """A line about it."""
        facts = self.facts
        return (
            f"{self.kind} ({self.parts}): {counted(facts['parameters'], 'parameter')}, {size_text(facts['bytes'])}, "
            f"context error {self.error:.4g}"
        )


class Maker:
    """Makes initial students of several kinds from the same statistics."""

    def __init__(
        self, teacher: TeacherEncoder, size: Size, ids: TokenIds, work: WorkFolder, *, batch_size: int,
        progress: Progress,
    ) -> None:  # fmt: skip
        """Run the encoder over the prompts. Raises SettingsError for a size above the teacher's, PromptsError."""
        size.check_within(teacher.size)
        ids.check_enough(size.width, teacher.identity.pad_token_id)
        self._teacher, self._size, self._progress = teacher, size, progress
        count, all_NT = len(ids.fitted_NT), torch.cat([ids.fitted_NT, ids.held_NT])
        self._sums: Sums = collect(
            teacher.load, all_NT, count, work, config=teacher.weights.config, batch_size=batch_size, progress=progress
        )
        self._fitted, self._held = (
            Pairs(work=work, token_ids_NT=all_NT, chunks=chunks, width=teacher.size.width, batch_size=batch_size)
            for chunks in (chunks_of(0, count), chunks_of(count, len(all_NT)))
        )

    def cut(self) -> Initial:
        """Layers, heads and feed-forward units of the encoder, at a smaller width."""
        cutter = self._cutter(self._size)
        layers, heads = choose(cutter, self._readout(), self._teacher.size, self._progress)
        return self._fit("cut", cutter.student(layers, heads), f"layers {_listed(layers)}, heads {_listed(heads)}")

    def shallow(self, parameters: int | None = None) -> Initial | None:
        """Layers of the encoder at full width.

        parameters: the most that it may have, which sets its number of layers; None: as many layers as the size has.
        """
        config, size = self._teacher.weights.config, self._teacher.size
        kept = self._size.layers if parameters is None else self._layers_within(parameters)
        if kept == 0:
            return None
        cutter = self._cutter(Size(layers=kept, heads=size.heads, width=size.width, units=size.units))
        heads, readout = tuple(range(config["num_heads"])), self._readout()
        starts = layer_starts(kept, size.layers)
        layers: Parts = best_by_swaps(
            starts,
            lambda kept: (),
            lambda layers: readout.error(cutter.student(layers, heads).encoder),
            evaluations=len(starts),
        )
        return self._fit("shallow", cutter.student(layers, heads), f"layers {_listed(layers)}")

    def pretrained(self, source: str) -> Initial:
        """Another T5 v1.1 with its own weights. StudentError for any other encoder."""
        student = new_student(source, self._teacher.identity, init="pretrained", dropout=0.0, seed=0)
        if not isinstance(student, SecondcastStudent):
            raise StudentError(
                f"--from is {source}, which has a tokenizer of its own, expected a T5 v1.1 with the teacher's tokens, "
                f"such as google/t5-v1_1-base: the projection is fitted token by token"
            )
        check_gated({**student.config.to_dict(), "model_type": "t5"}, source, StudentError)
        return self._fit("pretrained", student.to(self._teacher.context_ID.device).eval(), source)

    def _fit(self, kind: Kind, student: SecondcastStudent, parts: str) -> Initial:
        context_ID, rows = self._teacher.context_ID, student.config.project_out_dim
        passed = fit_projection(student, self._fitted, context_ID)
        if passed < student.config.project_in_dim:
            self._progress.say(
                f"{kind}: the projection has {rows} rows, so that {passed} of the {student.config.project_in_dim} "
                f"directions of the encoder's output pass its ReLU: those that matter most to the transformer"
            )
        return Initial(kind=kind, student=student, parts=parts, error=context_error(student, self._held, context_ID))

    def _cutter(self, size: Size) -> Cutter:
        return Cutter(
            self._teacher.weights, self._sums, size, self._config(size), device=self._teacher.context_ID.device
        )

    def _config(self, size: Size) -> StudentConfig:
        return size.student_config(self._teacher.weights.config, text_length=self._teacher.identity.text_length)

    def _readout(self) -> Readout:
        return Readout.of(self._fitted.first(SEARCH_PROMPTS), self._held, self._teacher.context_ID)

    def _layers_within(self, parameters: int) -> int:
        size, kept = self._teacher.size, 0
        while kept < size.layers and self._count(
            Size(layers=kept + 1, heads=size.heads, width=size.width, units=size.units)
        ) <= parameters:  # fmt: skip
            kept += 1
        return kept

    def _count(self, size: Size) -> int:
        with torch.device("meta"):
            return parameter_count(SecondcastStudent(self._config(size)))


def make_initial(maker: Maker, kind: str, source: str | None, progress: Progress) -> tuple[list[Initial], Initial]:
    """The initial students of a kind, or of all kinds that are possible (auto), and the one to keep.

    auto: `shallow` with no more parameters than `cut` has; `pretrained` if a source is given; the lowest context error.
    """
    made: list[Initial] = []
    if kind in ("cut", "auto"):
        made.append(maker.cut())
    if kind == "shallow":
        made += filter(None, [maker.shallow()])
    elif kind == "auto":
        most = int(made[0].facts["parameters"])
        shallow = maker.shallow(most)
        if shallow is None:
            progress.say(
                f"shallow: left out, 1 layer at the teacher's width has more than the {most:,} parameters of the size"
            )
        made += filter(None, [shallow])
    if source is not None:
        made.append(maker.pretrained(source))
    return made, min(made, key=lambda one: one.error)


def _listed(parts: Parts) -> str:
    return ",".join(map(str, parts))



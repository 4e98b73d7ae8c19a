"""Make an initial student out of a teacher's own text encoder, before any training."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from transformers import T5EncoderModel

from secondcast.models.memory.meta_run import parameter_count
from secondcast.models.student.initial.cut import Cutter, choose, layer_starts
from secondcast.models.student.initial.encoder_weights import EncoderWeights, check_gated
from secondcast.models.student.initial.projection import context_error, fit_projection
from secondcast.models.student.initial.search import Parts, Readout
from secondcast.models.student.initial.settings import Kind
from secondcast.models.student.initial.size import Size
from secondcast.models.student.initial.statistics import Pairs, Sums, chunks_of, collect
from secondcast.models.student.initial.work_folder import WorkFolder
from secondcast.models.student.projection_rank import check_fitted_rank, check_rank
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
    """Makes initial students of several kinds from one run of the teacher's encoder over the prompts."""

    def __init__(
        self, teacher: TeacherEncoder, size: Size, ids: TokenIds, work: WorkFolder, *, kind: str, batch_size: int,
        progress: Progress, projection_rank: int | None = None,
    ) -> None:  # fmt: skip
        """kind: a Kind or "auto". projection_rank: None: full.

        Raises SettingsError for a size above the teacher's or a rank that is too large, PromptsError for few tokens.
        """
        size.check_within(teacher.size)
        check_rank(projection_rank, teacher.identity.text_width)
        check_fitted_rank(projection_rank, len(teacher.context_ID))
        width = teacher.size.width if kind == "shallow" else size.width
        ids.check_enough(width, teacher.identity.pad_token_id)
        self._teacher, self._size, self._ids, self._work = teacher, size, ids, work
        self._kind, self._batch_size, self._progress = kind, batch_size, progress
        self._projection_rank = projection_rank

    def make(self, source: str | None) -> tuple[list[Initial], Initial]:
        """The students of the kind, or of all kinds that are possible (auto), and the one of the lowest context error.

        source: of `pretrained`; auto leaves that kind out without one, and `shallow` unless it has at most the
        parameters of `cut`.
        """
        made: list[Initial] = []
        if self._kind in ("cut", "auto"):
            made.append(self.cut())
        if self._kind == "shallow":
            made.append(self.shallow(self._size.layers))
        elif self._kind == "auto":
            most = int(made[0].facts["parameters"])
            if layers := self._layers_within(most):
                made.append(self.shallow(layers))
            else:
                self._progress.say(
                    f"shallow: left out, 1 layer at the teacher's width has more than the {most:,} parameters of cut"
                )
        if source is not None:
            made.append(self.pretrained(source))
        return made, min(made, key=lambda one: one.error)

    def cut(self) -> Initial:
        """Layers, heads and feed-forward units of the encoder, at a smaller width."""
        cutter = self._cutter(self._size)
        layers, heads = choose(cutter, self._readout(), self._teacher.size, self._progress)
        return self._fit("cut", cutter.student(layers, heads), f"layers {_listed(layers)}, heads {_listed(heads)}")

    def shallow(self, layers: int) -> Initial:
        """Some layers of the encoder at full width."""
        size = self._teacher.size
        cutter = self._cutter(replace(size, layers=layers))
        heads, readout, starts = tuple(range(size.heads)), self._readout(), layer_starts(layers, size.layers)
        kept = min(starts, key=lambda parts: readout.error(cutter.student(parts, heads).encoder))
        return self._fit("shallow", cutter.student(kept, heads), f"layers {_listed(kept)}")

    def pretrained(self, source: str) -> Initial:
        """Another T5 v1.1 with its own weights. StudentError for any other encoder."""
        student = new_student(
            source, self._teacher.identity, init="pretrained", dropout=0.0, seed=0,
            projection_rank=self._projection_rank,
        )  # fmt: skip
        if not isinstance(student, SecondcastStudent):
            raise StudentError(
                f"--from is {source}, which has a tokenizer of its own, expected a T5 v1.1 with the teacher's tokens, "
                f"such as google/t5-v1_1-base: the projection is fitted token by token"
            )
        check_gated({**student.config.to_dict(), "model_type": "t5"}, source, StudentError)
        return self._fit("pretrained", student.to(self._teacher.context_ID.device).eval(), source)

    def _fit(self, kind: Kind, student: SecondcastStudent, parts: str) -> Initial:
        context_ID, rows = self._teacher.context_ID, student.config.project_out_dim
        _, fitted, held = self.collected
        passed = fit_projection(student, fitted, context_ID)
        if passed < student.config.project_in_dim:
            self._progress.say(
                f"{kind}: the projection has {rows} rows, so that {passed} of the {student.config.project_in_dim} "
                f"directions of the encoder's output pass its ReLU: those that matter most to the transformer"
            )
        return Initial(kind=kind, student=student, parts=parts, error=context_error(student, held, context_ID))

    def _cutter(self, size: Size) -> Cutter:
        return Cutter(
            self._teacher.weights, self.collected[0], size, self._config(size), device=self._teacher.context_ID.device
        )

    def _config(self, size: Size) -> StudentConfig:
        return size.student_config(
            self._teacher.weights.config,
            text_length=self._teacher.identity.text_length,
            projection_rank=self._projection_rank,
        )

    def _readout(self) -> Readout:
        _, fitted, held = self.collected
        return Readout.of(fitted.first(SEARCH_PROMPTS), held, self._teacher.context_ID)

    @cached_property
    def collected(self) -> tuple[Sums, Pairs, Pairs]:
        """The sums, and token ids with embeddings to fit and to hold out."""
        count, all_NT = len(self._ids.fitted_NT), torch.cat([self._ids.fitted_NT, self._ids.held_NT])
        sums = collect(
            self._teacher.load, all_NT, count, self._work,
            config=self._teacher.weights.config, batch_size=self._batch_size, progress=self._progress,
        )  # fmt: skip
        fitted, held = (
            Pairs(
                work=self._work, token_ids_NT=all_NT, chunks=chunks, width=self._teacher.size.width,
                batch_size=self._batch_size,
            )
            for chunks in (chunks_of(0, count), chunks_of(count, len(all_NT)))
        )  # fmt: skip
        return sums, fitted, held

    def _layers_within(self, parameters: int) -> int:
        size, kept = self._teacher.size, 0
        while kept < size.layers and self._count(replace(size, layers=kept + 1)) <= parameters:
            kept += 1
        return kept

    def _count(self, size: Size) -> int:
        with torch.device("meta"):
            return parameter_count(SecondcastStudent(self._config(size)))


def _listed(parts: Parts) -> str:
    return ",".join(map(str, parts))

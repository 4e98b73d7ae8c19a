"""Evaluates the students of a report on held-out trajectories of its cache: open loop, and closed loop with images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch

from secondcast.evaluation.closed_loop import Sample, each_sample
from secondcast.evaluation.held_out import HeldOut, held_out_trajectories, spread
from secondcast.evaluation.on_cache import backbone_of
from secondcast.evaluation.open_loop import open_loop
from secondcast.evaluation.pictures.distances import check_measurable, psnr_db, ssim
from secondcast.evaluation.replaying import EmbedPrompts, cached_embeddings
from secondcast.evaluation.results import StepErrors
from secondcast.evaluation.settings.cache_scoring import CacheScoring
from secondcast.inspection.report.integrity import Readable
from secondcast.inspection.report.strips import StripMaker
from secondcast.inspection.report.students import (
    NO_PICTURES,
    Asked,
    Students,
    closed_facts,
    hardness_of,
    student_facts,
)
from secondcast.models.backbone import Backbone
from secondcast.models.memory.meta_run import parameter_count
from secondcast.models.student.tokens import text_length_remark
from secondcast.models.teacher.folder import TeacherFolder
from secondcast.storage_schemas.errors import (
    DamagedCacheError,
    MissingExtraError,
    NonFiniteError,
    NotInCacheError,
    SettingsError,
)
from secondcast.storage_schemas.progress import Progress, counted


@dataclass(frozen=True, kw_only=True)
class _ClosedLoop:
    """Closed loops by student, in the page's form, and the pictures beside theirs."""

    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    pictures: dict[str, Any] = field(default_factory=lambda: dict(NO_PICTURES))


@dataclass(frozen=True, kw_only=True)
class Evaluating:
    """Evaluates students.

    asked: the students, loaded.
    teacher: folder of the recorded transformer.
    maker: None without a VAE.
    """

    asked: Sequence[Asked]
    readable: Readable
    teacher: TeacherFolder
    scoring: CacheScoring
    device: torch.device
    maker: StripMaker | None
    progress: Progress

    def run(self, row_of: Mapping[str, int]) -> Students:
        """Open loop of each student on the same trajectories, closed loop on some of them.

        row_of: table rows by key.
        """
        notes = list[str]()
        chosen = self._chosen(notes)
        facts = []
        closed = self._closed(chosen, row_of, notes) if chosen and self.scoring.closed_loop else _ClosedLoop()
        replay_error = self._replay_error(chosen, notes) if chosen else None
        rows = [row_of[one.key] for one in chosen]
        for one in self.asked:
            assert one.network is not None
            if remark := text_length_remark(one.network.network, self.readable.cache.manifest.teacher):
                notes.append(f"{one.name}: {remark}")
            errors = self._errors(one.name, one.network.embeddings, chosen, notes) if chosen else None
            facts.append(student_facts(one, rows, self._steps, errors, replay_error, closed.facts.get(one.name)))
        return Students(facts=facts, notes=notes, hardness=hardness_of(facts), pictures=closed.pictures)

    @cached_property
    def _backbone(self) -> Backbone:
        # Loaded only if there is something to evaluate: it takes minutes and most of a GPU.
        parameters = sum(parameter_count(one.network.network) for one in self.asked if one.network is not None)
        return backbone_of(
            self.readable.cache, self.teacher, self.scoring, self.device, self.progress, student_parameters=parameters
        )

    @property
    def _steps(self) -> tuple[int, ...]:
        return tuple(range(self.readable.cache.manifest.sampling.steps))

    def _chosen(self, notes: list[str]) -> list[HeldOut]:
        try:
            everything = held_out_trajectories(self.readable.cache)
        except (NotInCacheError, DamagedCacheError) as error:
            notes.append(f"students were not evaluated: {error}")
            return []
        wanted = [everything[place] for place in spread(everything, self.scoring.num_trajectories)]
        chosen = [one for one in wanted if self._is_whole(one)]
        notes.append(
            f"students on {len(chosen):,} of {len(everything):,} held-out trajectories, spread over the sources"
        )
        if len(chosen) < len(wanted):
            notes.append(
                f"skipped {counted(len(wanted) - len(chosen), 'held-out trajectory')}: damaged, not finite, or "
                f"without the pooled vector"
            )
        return chosen

    def _is_whole(self, one: HeldOut) -> bool:
        trajectory = self.readable.trajectory(one.index)
        if trajectory is None:
            return False
        arrays = (trajectory.noise_SC, trajectory.velocity_KSC, trajectory.final_latent_SC)
        return all(np.isfinite(array.astype(np.float32)).all() for array in arrays) and self._has_pooled(one)

    def _has_pooled(self, one: HeldOut) -> bool:
        return self.readable.cache.manifest.teacher.pooled == "zero" or self.readable.has_embedding(one.prompt)

    def _replay_error(self, chosen: Sequence[HeldOut], notes: list[str]) -> StepErrors | None:
        if not all(self.readable.has_embedding(one.prompt) for one in chosen):
            notes.append("no replay error: the cache lacks the teacher's embeddings of some prompts")
            return None
        return self._errors("replay_error", cached_embeddings(self.readable.cache, self.device), chosen, notes)

    def _errors(self, name: str, embed: EmbedPrompts, chosen: Sequence[HeldOut], notes: list[str]) -> StepErrors | None:
        try:
            return open_loop(
                self.readable.cache, self._backbone, {name: embed}, chosen, self._steps,
                batch_size=self.scoring.batch_size, progress=self.progress,
            )[name]  # fmt: skip
        except NonFiniteError as error:
            notes.append(f"no errors for {name}: {error}")
            return None

    def _closed(self, chosen: Sequence[HeldOut], row_of: Mapping[str, int], notes: list[str]) -> _ClosedLoop:
        if self.maker is None:
            notes.append("no closed loop: it needs the VAE")
            return _ClosedLoop()
        wanted = [chosen[place] for place in spread(chosen, self.scoring.closed_loop)]
        rows, found = [row_of[one.key] for one in wanted], _ClosedLoop()
        measured = self._is_measured(notes)
        for one in self.asked:
            assert one.network is not None
            if (samples := self._sampled(one.name, one.network.embeddings, wanted, notes)) is not None:
                found.facts[one.name] = closed_facts(
                    rows,
                    [sample.latent_fraction for sample in samples],
                    [psnr_db(sample.picture_HWC, sample.recorded_HWC) for sample in samples if measured],
                    [ssim(sample.picture_HWC, sample.recorded_HWC) for sample in samples if measured],
                    [self.maker.picture(sample.picture_HWC) for sample in samples],
                )
                found.pictures["rows"] = rows
                found.pictures["teacher"] = [self.maker.picture(sample.recorded_HWC) for sample in samples]
        if found.facts and self.scoring.random_baseline:
            assert self.asked[0].network is not None
            untrained = self.asked[0].network.untrained(seed=self.scoring.seed)
            samples = self._sampled("an untrained student", untrained.embeddings, wanted, notes) or []
            found.pictures["untrained"] = [self.maker.picture(sample.picture_HWC) for sample in samples]
        return found

    def _is_measured(self, notes: list[str]) -> bool:
        """Whether PSNR and SSIM can be measured; if not, a note has the reason."""
        sampling = self.readable.cache.manifest.sampling
        try:
            check_measurable(sampling.height, sampling.width)
        except MissingExtraError:
            notes.append(
                "closed loop without PSNR and SSIM, which need scikit-image: pip install 'secondcast[metrics]'"
            )
            return False
        except SettingsError:
            notes.append(
                f"closed loop without PSNR and SSIM: images of {sampling.height} x {sampling.width} are too small"
            )
            return False
        return True

    def _sampled(
        self, name: str, embed: EmbedPrompts, wanted: Sequence[HeldOut], notes: list[str]
    ) -> list[Sample] | None:
        """Images in the order of the trajectories; None if a latent is not finite."""
        assert self.maker is not None
        try:
            return list(
                each_sample(
                    self.readable.cache, self._backbone, self.maker.decoder, {name: embed}, wanted,
                    batch_size=self.scoring.batch_size, progress=self.progress,
                )
            )  # fmt: skip
        except NonFiniteError as error:
            notes.append(f"no closed loop for {name}: {error}")
            return None

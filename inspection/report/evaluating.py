"""Evaluates the students of a report on held-out trajectories of its cache: open loop, and closed loop with images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from secondcast.evaluation.closed_loop import closed_loop
from secondcast.evaluation.held_out import HeldOut, held_out_trajectories, spread
from secondcast.evaluation.on_cache import backbone_of
from secondcast.evaluation.open_loop import open_loop
from secondcast.evaluation.pictures.distances import check_measurable
from secondcast.evaluation.replaying import EmbedPrompts, cached_embeddings
from secondcast.evaluation.results import SampledResult, StepErrors
from secondcast.evaluation.settings.cache_scoring import CacheScoring
from secondcast.inspection.report.integrity import Readable
from secondcast.inspection.report.strips import StripMaker
from secondcast.inspection.report.students import Asked, Students, hardness_of, sampled_facts, student_facts
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
from secondcast.storage_schemas.schema.fields import Array

# Cannot collide with a student's name, which may equal that of the recording.
_STUDENT = "student"


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
        asked, notes = self.asked, list[str]()
        chosen = self._chosen(notes)
        facts = []
        results = self._closed(asked, chosen, row_of, notes) if chosen and self.scoring.closed_loop else {}
        replay_error = self._replay_error(chosen, notes) if chosen else None
        rows = [row_of[one.key] for one in chosen]
        for one in asked:
            assert one.network is not None
            if remark := text_length_remark(one.network.network, self.readable.cache.manifest.teacher):
                notes.append(f"{one.name}: {remark}")
            errors = self._errors(one.name, one.network.embeddings, chosen, notes) if chosen else None
            facts.append(student_facts(one, rows, self._steps, errors, replay_error, results.get(one.name)))
        return Students(facts=facts, notes=notes, hardness=hardness_of(facts))

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

    def _closed(
        self, asked: Sequence[Asked], chosen: Sequence[HeldOut], row_of: Mapping[str, int], notes: list[str]
    ) -> dict[str, dict[str, Any]]:
        sampling = self.readable.cache.manifest.sampling
        if self.maker is None:
            notes.append("no closed loop: it needs the VAE")
            return {}
        try:
            check_measurable(sampling.height, sampling.width)
        except (MissingExtraError, SettingsError) as error:
            notes.append(f"no closed loop: {error}")
            return {}
        wanted = [chosen[place] for place in spread(chosen, self.scoring.closed_loop)]
        rows, found = [row_of[one.key] for one in wanted], {}
        for one in asked:
            try:
                result, pictures = self._sampled(one, wanted, self.maker)
            except NonFiniteError as error:
                notes.append(f"no closed loop for {one.name}: {error}")
                continue
            found[one.name] = sampled_facts(result, rows, pictures)
        return found

    def _sampled(self, one: Asked, wanted: Sequence[HeldOut], maker: StripMaker) -> tuple[SampledResult, list[str]]:
        """Closed loop of a student, with the final images in the order of the trajectories."""
        assert one.network is not None
        pictures: list[str] = []

        def keep(leader: str, _: HeldOut, picture_HWC: Array) -> None:
            if leader == _STUDENT:
                pictures.append(maker.picture(picture_HWC))

        result = closed_loop(
            self.readable.cache, self._backbone, maker.decoder, {_STUDENT: one.network.embeddings}, wanted,
            lpips=None, batch_size=self.scoring.batch_size, progress=self.progress, keep=keep,
        )[_STUDENT]  # fmt: skip
        return result, pictures

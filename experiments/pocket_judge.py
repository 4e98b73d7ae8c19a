"""What `experiments.pocket_training` measures: the scores of `secondcast evaluate score`, and errors."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from secondcast.commands.shell.resolve import POCKET, resolve_teacher, student_source
from secondcast.evaluation.pocket_scores import Score, score_images
from secondcast.evaluation.sampling import Generator, OwnTokensEmbed
from secondcast.models.student.folder import checkpoints
from secondcast.models.student.student import load_student, new_student
from secondcast.models.student.tokens import own_tokens
from secondcast.models.teacher.context_projection import load_context_projection
from secondcast.models.teacher.folder import BUILD_PARTS
from secondcast.models.teacher.text_encoder import TeacherTextEncoder
from secondcast.pocket.world import Composition, Landscape, Sign, captions, require_scene
from secondcast.storage_schemas.progress import Silent
from secondcast.storage_schemas.reader import Cache
from secondcast.storage_schemas.schema.fields import Array
from secondcast.trainer.data.replay_dataset import ReplayDataset, Source
from secondcast.trainer.losses.context import context_loss
from secondcast.trainer.losses.embedding import embedding_loss
from secondcast.trainer.losses.objective import Objective
from secondcast.trainer.losses.validation import validation_loss
from secondcast.trainer.settings import TrainFlags

KIND_NAMES = {Landscape: "scene", Composition: "composition", Sign: "sign"}

Embed = Callable[[torch.Tensor], torch.Tensor]


class Judge:
    """Scores on held-out captions, embedding errors on the same, vision loss on the cache's held-out trajectories."""

    def __init__(self, cache_folder: Path, count: int, steps: int = 20) -> None:
        cpu = torch.device("cpu")
        cache = Cache.open(str(cache_folder))
        teacher = resolve_teacher(POCKET, BUILD_PARTS)
        # The other settings, and the default of steps, are those of `secondcast evaluate score`.
        self._studio = Generator.open(
            teacher, resolution=None, steps=steps, guidance=3.5, seed=0, dtype=torch.float32, device=cpu
        )
        self._captions = captions(count, seed=0, split="heldout")
        self._teacher = TeacherTextEncoder.load(teacher, dtype=torch.float32, device=cpu)
        self._recorded = cache.manifest.teacher
        self._context_ID = load_context_projection(teacher, self._recorded, cpu)
        held_out = [at for at in range(len(cache)) if cache.prompts[cache.layout.place(at).prompt].held_out]
        if not held_out:
            raise ValueError(f"of {len(cache)} trajectories of {cache_folder} none is held out: record more prompts")
        self._dataset = ReplayDataset([Source(cache=cache, indices=np.array(held_out))], device=cpu)
        self._rows = len(held_out) * cache.manifest.sampling.steps
        self._objective = Objective(
            settings=TrainFlags(student="", batch_size=40).settings(),
            backbones=[self._studio.backbone],
            context_ID=self._context_ID,
            sigmas=[cache.manifest.sampling.sigmas],
        )

    def student(self, run: Path) -> dict[str, Any]:
        """Of a run's last checkpoint, whichever was best: all arms are judged at their last step."""
        return self.saved(checkpoints(run)[-1] / "student")

    def saved(self, folder: Path) -> dict[str, Any]:
        """Of the student in a folder."""
        student = load_student(folder)
        found = {"parameters": sum(p.numel() for p in student.parameters())}
        tokens = own_tokens(folder, student)
        if tokens is None:
            return found | self._measure(lambda ids: student(ids)[0])
        # Its tokens are not the teacher's: nothing to compare one by one, and the cache holds other ids.
        return found | self._score(OwnTokensEmbed(embed=lambda ids: student(ids)[0], token_ids=tokens.batch))

    def errors(self, folder: Path) -> dict[str, Any]:
        """Of the student in a folder that reads the teacher's tokens: its losses, without pictures."""
        student = load_student(folder)
        return self._errors(lambda ids: student(ids)[0])

    def reference(self, name: str, student: str) -> dict[str, Any]:
        """Of the teacher's own encoder, or of a student with random weights."""
        if name == "teacher":
            return self._measure(self._teacher.encode)
        made = new_student(student_source(student), self._recorded, init="random", dropout=0.0, seed=0).eval()
        return self._measure(lambda ids: made(ids)[0])

    @torch.no_grad()
    def _score(self, embed: Embed) -> dict[str, Any]:
        with Silent().bar("", total=0, done=0, unit="") as bar:
            images_NHWC = self._studio.images(embed, self._captions, batch_size=64, bar=bar)
        scores = score_images(images_NHWC, self._captions)
        return {
            "scores": {name: {"mean": score.mean, "count": score.count} for name, score in scores.items()},
            "mean": mean_score({name: score.mean for name, score in scores.items()}),
            "kinds": self._by_kind(images_NHWC),
        }

    def _by_kind(self, images_NHWC: Array) -> dict[str, float]:
        """Mean score of the captions of each kind, of the dimensions that they have."""
        rows: dict[str, list[int]] = {}
        for row, text in enumerate(self._captions):
            rows.setdefault(KIND_NAMES[type(require_scene(text))], []).append(row)
        return {
            kind: mean_score({k: v.mean for k, v in self._scores_of(images_NHWC, own).items()})
            for kind, own in sorted(rows.items())
        }

    def _scores_of(self, images_NHWC: Array, rows: Sequence[int]) -> Mapping[str, Score]:
        return score_images(images_NHWC[rows], [self._captions[row] for row in rows])

    def _measure(self, embed: Embed) -> dict[str, Any]:
        return self._score(embed) | self._errors(embed)

    @torch.no_grad()
    def _errors(self, embed: Embed) -> dict[str, Any]:
        ids_NT = self._studio.token_ids(self._captions)
        found_NTD, wanted_NTD = embed(ids_NT), self._teacher.encode(ids_NT)
        return {
            "vision_loss": validation_loss(self._objective, self._dataset, embed, rows=self._rows).mean,
            "embedding_error": float(embedding_loss(found_NTD, wanted_NTD)),
            "context_error": float(context_loss(found_NTD, wanted_NTD, self._context_ID)),
        }


def mean_score(means: Mapping[str, float]) -> float:
    """The dimensions alike, however many captions each has."""
    return float(np.mean(list(means.values())))

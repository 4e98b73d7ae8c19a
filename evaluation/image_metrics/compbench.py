"""T2I-CompBench's score of each category by its own network, and their average over those that can be scored."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from secondcast.evaluation.image_metrics.categories import by_prompt, prompt_means
from secondcast.evaluation.image_metrics.clip_score import ClipScore
from secondcast.evaluation.image_metrics.metric import MetricName, Needs, Picture, Scored, mean_of
from secondcast.evaluation.image_metrics.vqa import AttributeBinding
from secondcast.evaluation.intervals import bootstrap_average
from secondcast.storage_schemas.errors import PromptsError
from secondcast.storage_schemas.progress import Progress

BY_VQA = ("color", "shape", "texture")
BY_CLIP = ("non_spatial",)
# Their score needs a detector, UniDet, which is not part of Secondcast.
BY_DETECTOR = ("3d_spatial", "numeracy", "spatial")
COMPLEX = "complex"
# Complex prompts without a spatial relation, the only ones whose mixture needs no detector.
_ACTION = "complex_action"
CATEGORIES = (*BY_VQA, *BY_CLIP, COMPLEX, *BY_DETECTOR)
_SCORED = (*BY_VQA, *BY_CLIP, _ACTION)
_IN_PAPER = (*BY_VQA, *BY_CLIP, "spatial", COMPLEX)
_NO_IMAGES, _NO_PHRASES = "no images", "no image has phrases"
_NEEDS_DETECTOR = "it needs UniDet: run the benchmark's scripts on the output of `secondcast evaluate compbench`"


class CompBench:
    """Huang et al. 2023 (arXiv 2307.06350): BLIP-VQA for attributes, CLIP's cosine for non-spatial relations.

    `compbench` is the mean of the means of the categories that it has; it names them and those that it lacks.
    `compbench-complex-action` is (BLIP-VQA + cosine) / 2 of the complex prompts with actions only, which the 3-in-1
    mixture gives them; prompts with spatial relations need UniDet too. Without one of the networks, what the other can
    score is scored.
    """

    name: MetricName = "compbench"

    def __init__(self, vqa_model: str, clip_model: str, *, batch_size: int, device: torch.device) -> None:
        self._vqa = AttributeBinding(vqa_model, batch_size=batch_size, device=device)
        self._clip = ClipScore(clip_model, batch_size=batch_size, device=device, flag="--compbench-clip-model")
        vqa, clip = self._vqa.needs, self._clip.needs
        self.needs = Needs(
            packages=vqa.packages, weights=f"{vqa.weights}, {clip.weights}", how=f"{vqa.how}; {clip.how}"
        )

    def check(self, pictures: Sequence[Picture]) -> None:
        """See Metric."""
        if not any(_of(pictures, category) for category in _SCORED):
            raise PromptsError(
                f"compbench: no image of {pictures[0].file.parent} has one of the categories {', '.join(_SCORED)}: "
                f"give --prompts with the file of `secondcast prompts compbench --split val`"
            )

    def available(self) -> str | None:
        """See Metric. Either network suffices."""
        reasons = [self._vqa.available(), self._clip.available()]
        return None if None in reasons else "; ".join(reason for reason in reasons if reason is not None)

    def score(self, pictures: Sequence[Picture], progress: Progress) -> list[Scored]:
        """See Metric."""
        self.check(pictures)
        missing = _beyond_the_networks(pictures)
        vqa, phrases = self._vqa_values(pictures, progress, missing)
        clip = self._clip_values(pictures, progress, missing)
        parts: dict[str, dict[str, float]] = {}
        for category in (*BY_VQA, *BY_CLIP):
            values = vqa if category in BY_VQA else clip
            part = {p.name: values[p.name] for p in _of(pictures, category) if p.name in values}
            if part:
                parts[category] = part
            else:
                missing.setdefault(category, _NO_PHRASES if _of(pictures, category) else _NO_IMAGES)
        action = {
            p.name: (vqa[p.name] + clip[p.name]) / 2 for p in _of(pictures, _ACTION) if p.name in vqa and p.name in clip
        }
        scores = []
        model, revision = self._made_by(bool(vqa), bool(clip))
        if parts:
            scores.append(replace(_average(parts, pictures, model, revision), phrases=phrases, missing=missing))
        if action:
            of_action = mean_of(f"{self.name}-complex-action", action, model=model, revision=revision)
            scores.append(replace(by_prompt(of_action, pictures), phrases=phrases))
        if not scores:
            raise PromptsError("compbench: " + "; ".join(f"no {name}: {why}" for name, why in missing.items()))
        return scores

    def _vqa_values(
        self, pictures: Sequence[Picture], progress: Progress, missing: dict[str, str]
    ) -> tuple[dict[str, float], str | None]:
        """BLIP-VQA by image, and what found the phrases; notes in `missing` why there is none."""
        asked = [p for p in pictures if set(p.categories) & {*BY_VQA, _ACTION}]
        if not asked:
            return {}, None
        if (why := self._vqa.available()) is not None:
            missing.update(dict.fromkeys((*BY_VQA, _ACTION), why))
            return {}, None
        try:
            (scored,) = self._vqa.score(asked, progress)
        except PromptsError as error:
            missing.update(dict.fromkeys((*BY_VQA, _ACTION), str(error)))
            return {}, None
        return dict(scored.values), scored.phrases

    def _clip_values(
        self, pictures: Sequence[Picture], progress: Progress, missing: dict[str, str]
    ) -> dict[str, float]:
        """CLIP's cosine by image, for complex prompts without adjectives where these are known."""
        asked = [p for p in pictures if set(p.categories) & set(BY_CLIP)]
        asked += [
            replace(p, prompt=p.without_adjectives or p.prompt)
            for p in pictures
            if _ACTION in p.categories and p not in asked
        ]
        if not asked:
            return {}
        if (why := self._clip.available()) is not None:
            missing.update(dict.fromkeys((*BY_CLIP, _ACTION), why))
            return {}
        return self._clip.cosines(asked, progress)

    def _made_by(self, vqa: bool, clip: bool) -> tuple[str, str]:
        used = [metric for metric, there in ((self._vqa, vqa), (self._clip, clip)) if there]
        return ", ".join(metric.needs.weights for metric in used), ", ".join(metric.revision for metric in used)


def is_final(score: Scored) -> bool:
    """Whether no category that a score lacks would be there if another network was installed."""
    beyond = (COMPLEX, *BY_DETECTOR)
    return all(name in beyond or why in (_NO_IMAGES, _NO_PHRASES) for name, why in score.missing.items())


def _of(pictures: Sequence[Picture], category: str) -> list[Picture]:
    return [picture for picture in pictures if category in picture.categories]


def _beyond_the_networks(pictures: Sequence[Picture]) -> dict[str, str]:
    """Reasons for the categories that are never scored as a whole, of the paper's and of those with images."""
    found = {}
    for category in (COMPLEX, *BY_DETECTOR):
        if _of(pictures, category):
            found[category] = _NEEDS_DETECTOR
        elif category in _IN_PAPER:
            found[category] = _NO_IMAGES
    if COMPLEX in found and _of(pictures, COMPLEX):
        found[COMPLEX] = f"prompts with spatial relations need UniDet{_NEEDS_DETECTOR.removeprefix('it needs UniDet')}"
    return found


def _average(parts: dict[str, dict[str, float]], pictures: Sequence[Picture], model: str, revision: str) -> Scored:
    groups = [prompt_means(values, pictures) for values in parts.values()]
    interval = bootstrap_average(groups)
    low, high = interval or (None, None)
    values: dict[str, float] = {}
    for part in parts.values():
        values.update(part)
    return Scored(
        name="compbench", mean=float(np.mean([np.mean(group) for group in groups])), count=len(values), low=low,
        high=high, interval="none" if interval is None else "bootstrap", model=model, revision=revision, values=values,
        parts=tuple(parts),
    )  # fmt: skip

"""Mean errors of an evaluation: overall, by step, prompt source, guidance and prompt; and of its closed loop."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from secondcast.evaluation.results import Evaluation, SampledResult
from secondcast.storage_schemas.schema.fields import Array


def open_loop_summary(evaluation: Evaluation, *, hardest: int) -> dict[str, Any]:
    """Means over records (a step of a trajectory) with their counts, for printing or JSON.

    A prompt with several sources counts in each of them. hardest: number of prompts with the largest mean errors to
    list, worst first.
    """
    every = range(len(evaluation.trajectories))
    by_prompt = _grouped(every, lambda number: [evaluation.trajectories[number].prompt])
    prompts = [
        {
            "prompt": text,
            "sources": list(evaluation.trajectories[numbers[0]].sources),
            **_means(evaluation, numbers),
        }
        for text, numbers in by_prompt.items()
    ]
    return {
        "overall": _means(evaluation, every),
        "by_step": [
            {"step": step, "sigma": evaluation.sigmas[place], **_means(evaluation, every, place)}
            for place, step in enumerate(evaluation.steps)
        ],
        "by_source": _groups(evaluation, "source", lambda number: evaluation.trajectories[number].sources),
        "by_guidance": _groups(evaluation, "guidance", lambda number: [evaluation.trajectories[number].guidance]),
        "hardest_prompts": sorted(prompts, key=lambda found: -found["error_fraction"])[:hardest],
    }


def closed_loop_summary(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Means over trajectories for each text encoder; PSNR over images that differ, None if all are identical."""
    if evaluation.closed_loop is None:
        return []
    return [
        {"text_encoder": name, "trajectories": len(result.latent_fraction), **_sampled_row(result)}
        for name, result in evaluation.closed_loop.text_encoders.items()
    ]


def summary(evaluation: Evaluation, *, hardest: int = 10) -> dict[str, Any]:
    """All printed values, as plain JSON types."""
    stated = {
        name: getattr(evaluation, name)
        for name in ("student", "student_digest", "cache", "sampling_digest", "backbone", "committed", "held_out")
    }
    return {
        **stated,
        "computed": evaluation.computed.json_value(),
        "trajectories": len(evaluation.trajectories),
        "open_loop": open_loop_summary(evaluation, hardest=hardest),
        "closed_loop": closed_loop_summary(evaluation),
    }


def _sampled_row(result: SampledResult) -> dict[str, Any]:
    different = [value for value in result.psnr_db if value is not None]
    return {
        "identical_images": len(result.psnr_db) - len(different),
        "latent_fraction": _mean(result.latent_fraction),
        "psnr_db": _mean(different) if different else None,
        "ssim": _mean(result.ssim),
        "lpips": None if result.lpips is None else _mean(result.lpips),
    }


def _groups(evaluation: Evaluation, name: str, names_of: Any) -> list[dict[str, Any]]:
    found = _grouped(range(len(evaluation.trajectories)), names_of)
    ordered = sorted(found.items(), key=lambda group: (group[0] is not None, group[0]))
    return [{name: value, **_means(evaluation, numbers)} for value, numbers in ordered]


def _grouped(numbers: Iterable[int], names_of: Any) -> Mapping[Any, list[int]]:
    groups: dict[Any, list[int]] = {}
    for number in numbers:
        for name in names_of(number):
            groups.setdefault(name, []).append(number)
    return groups


def _means(evaluation: Evaluation, numbers: Sequence[int], step: int | None = None) -> dict[str, Any]:
    """Errors of these trajectories, at one step position or at all steps."""
    steps = slice(None) if step is None else slice(step, step + 1)

    def part(rows: Any) -> Array:
        return np.array([rows[number][steps] for number in numbers])

    errors, replay_error = evaluation.errors, evaluation.replay_error
    error = _mean(part(errors.error_fraction))
    under = None if replay_error is None else _mean(part(replay_error.error_fraction))
    return {
        "records": int(part(errors.error_fraction).size),
        "error_fraction": error,
        "replay_error_fraction": under,
        "error_per_replay_error_ratio": error / under if under else None,
        "error_mean_square": _mean(part(errors.mean_square)),
        "replay_error_mean_square": None if replay_error is None else _mean(part(replay_error.mean_square)),
    }


def _mean(values: Any) -> float:
    return float(np.mean(values))

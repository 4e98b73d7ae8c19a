"""The text output of `inspect compare`, from its facts. Does not import torch."""

from collections.abc import Sequence
from typing import Any

from secondcast.inspection.text_layout import table_lines
from secondcast.storage_schemas.progress import counted


def compare_lines(facts: dict[str, Any], *, width: int | None = None) -> list[str]:
    """Errors by step, then distances of the final images by trajectory; width: of the terminal, None for a pipe."""
    names = [student["name"] for student in facts["students"]]
    trajectories = facts["trajectories"]
    trained = sum(not row["held_out"] for row in trajectories)
    remark = f", {trained} of them with prompts that may have been used in training" if trained else ", all held out"
    return [
        f"{counted(len(trajectories), 'trajectory')} of {facts['cache']}{remark}",
        "",
        "open loop: error of the prediction, in % of the velocity's norm, mean over the trajectories",
        *_by_step(facts, names),
        "",
        "closed loop from the cached noise: PSNR in dB / SSIM against the teacher's image",
        *_by_trajectory(trajectories, names, width),
    ]


def _by_step(facts: dict[str, Any], names: Sequence[str]) -> list[str]:
    curves = [student["error_fraction_by_step"] for student in facts["students"]]
    if facts["replay_error_fraction_by_step"] is not None:
        curves, names = [*curves, facts["replay_error_fraction_by_step"]], [*names, "replay_error"]
    rows = [
        [str(step), f"{sigma:.4f}", *(f"{100 * curve[step]:.2f}" for curve in curves)]
        for step, sigma in enumerate(facts["sigmas"])
    ]
    mean = ["mean", "", *(f"{100 * sum(curve) / len(curve):.2f}" for curve in curves)]
    return table_lines(["step", "sigma", *names], [*rows, mean], text_columns=())


def _by_trajectory(trajectories: Sequence[dict[str, Any]], names: Sequence[str], width: int | None) -> list[str]:
    rows = [
        [str(row["index"]), *(distance_text(row["students"][name]) for name in names), row["prompt"]]
        for row in trajectories
    ]
    return table_lines(["trajectory", *names, "prompt"], rows, text_columns=(len(names) + 1,), width=width)


def distance_text(found: dict[str, Any]) -> str:
    """PSNR and SSIM of an image, or "identical" to the recorded one."""
    return "identical" if found["psnr_db"] is None else f"{found['psnr_db']:.2f} / {found['ssim']:.3f}"

"""Time budgets: the steps of stages with a budget_share, from the measured time of a step."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from secondcast.storage_schemas.progress import Progress, counted, duration_text
from secondcast.trainer.distributed.processes import Distributed
from secondcast.trainer.losses.validation import measured_sources
from secondcast.trainer.settings import TrainSettings

if TYPE_CHECKING:
    from secondcast.trainer.loop import Trainer

# The first steps of a stage allocate, and wait for the first batch.
_PROBES, _FIRST = 8, 3


def probe_settings(settings: TrainSettings) -> TrainSettings:
    """Settings with a few steps of each stage that has a share of the budget."""
    stages = [stage for stage in settings.stages if stage.budget_share is not None]
    probes = tuple(stage.model_copy(update={"steps": _PROBES}) for stage in stages)
    return settings.model_copy(update={"stages": probes})


def measured_seconds(settings: TrainSettings, make_trainer: "Callable[[Path, TrainSettings], Trainer]") -> list[float]:
    """Seconds of an optimizer step, including its share of validations, for each stage with a budget_share.

    make_trainer: creates a trainer with its own student from (run, settings); it runs a few steps and is discarded.
    """
    probe = probe_settings(settings)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(Path(folder), probe)
        taken = [step.seconds for step in trainer.timed_steps()]
        validation = 0.0
        if measured_sources(trainer.objective, trainer.held_out):
            if settings.compile:
                # The first validation compiles the graphs without gradients.
                trainer.validate(probe.total_steps)
            began = time.monotonic()
            trainer.validate(probe.total_steps)
            validation = time.monotonic() - began
    return [
        median(taken[end - _PROBES + _FIRST : end]) + validation / settings.checkpoint_steps(stage)
        for stage, end in zip(probe.stages, probe.ends, strict=True)
    ]


def steps_of_shares(settings: TrainSettings, seconds: list[float]) -> TrainSettings:
    """The settings with the steps that fit into each share of the budget; `seconds`: see measured_seconds."""
    assert settings.time_budget_seconds is not None
    left = iter(seconds)
    stages = []
    for stage in settings.stages:
        if stage.budget_share is not None:
            steps = int(settings.time_budget_seconds * stage.budget_share / next(left))
            stage = stage.model_copy(update={"steps": max(1, steps)})
        stages.append(stage)
    return settings.model_copy(update={"stages": tuple(stages)})


def with_steps(
    settings: TrainSettings,
    make_trainer: "Callable[[Path, TrainSettings], Trainer]",
    processes: Distributed,
    progress: Progress,
) -> TrainSettings:
    """The settings with steps in place of shares of a time budget, from what a step takes here.

    make_trainer: gives one whose student is thrown away.
    """
    if settings.time_budget_seconds is None:
        return settings
    # All agree on the slowest: they wait for each other in every step.
    seconds = processes.largest(measured_seconds(settings, make_trainer))
    settings = steps_of_shares(settings, seconds)
    left = iter(seconds)
    for stage in settings.stages:
        if stage.budget_share is not None:
            each = next(left)
            progress.say(
                f"stage {stage.name}: {counted(stage.length, 'step')} of {each:.3g} s as measured here, "
                f"{duration_text(stage.length * each)}"
            )
    return settings

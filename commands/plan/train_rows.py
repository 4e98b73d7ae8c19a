"""Stages, costs and memory of a run, as plain JSON types, for `secondcast plan train`. Keys end in their unit."""

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from secondcast.api.fitting import fit_lines
from secondcast.commands.plan.build_rows import hours_of, memory_facts, needed_text
from secondcast.models.memory.limit import GIB
from secondcast.storage_schemas.errors import SettingsError
from secondcast.storage_schemas.progress import counted
from secondcast.storage_schemas.sizes import cache_sizes
from secondcast.trainer.loss_kinds import LOSSES

if TYPE_CHECKING:
    from secondcast.models.cost.cards import Card
    from secondcast.models.cost.gpu_memory import GpuMemory
    from secondcast.storage_schemas.schema.manifest import Manifest
    from secondcast.trainer.cost.stage_cost import Costs
    from secondcast.trainer.settings import TrainSettings
    from secondcast.trainer.stage import Stage

# Paper, section 4: 320 thousand iterations of batch 32, one trajectory step per row.
PAPER_STEPS, PAPER_BATCH = 320_000, 32
AS_ASKED, FITTED, EVERY_BLOCK = "as_asked", "fitted", "activation_checkpointing_1"


def train_facts(ways: "Mapping[str, TrainSettings]", costs: "Costs", *, rate_flops: float | None) -> dict[str, Any]:
    """Memory, hours and read rate of variants of a run on (planned) caches, beside the paper's recipe."""
    settings = ways[AS_ASKED]
    return {
        "student": {"source": settings.student, "parameters": costs.student.parameters},
        "training": {
            "budget_hours": None if settings.time_budget_seconds is None else settings.time_budget_seconds / 3600,
            "checkpoint_every_steps": settings.checkpoint_every,
        },
        "ways": {name: _way(way, costs, rate_flops) for name, way in ways.items()},
    }


def ways_of(settings: "TrainSettings", fitted: "TrainSettings | None", *, named: bool) -> "dict[str, TrainSettings]":
    """Variants of a run: as given; fitted, if that differs; without a memory size, with every block recomputed."""
    ways = {AS_ASKED: settings}
    if named:
        return ways if fitted in (None, settings) else ways | {FITTED: fitted}
    memory = settings.memory
    if not settings.replays or memory.activation_checkpointing == 1 or memory.gpu_blocks is not None:
        return ways
    return ways | {EVERY_BLOCK: settings.model_copy(update={"activation_checkpointing": 1})}


def fit_verdicts(
    settings: "TrainSettings",
    costs: "Costs",
    memory_bytes: float | None,
    card: "Card | None",
    held: Collection[str],
) -> "tuple[list[str], TrainSettings | None]":
    """Whether a run fits, what `train --max-gpu-memory` chooses, and why; and the settings that fit.

    card: the GPU; None where --max-gpu-memory is given, whose choice is then part of the run.
    """
    if memory_bytes is None:
        return [], None
    from secondcast.trainer.cost.fitting import fit

    room = f"{card.name} has {memory_bytes / GIB:.1f} GiB" if card else f"the limit is {memory_bytes / GIB:.1f} GiB"
    needed = f"training: {_needed_text(costs.memory(settings))}, {room}"
    option = f"--max-gpu-memory {memory_bytes / GIB:.4g}GiB"
    try:
        fitted = fit(settings, costs, memory_bytes=memory_bytes, held=held)
        if fitted.settings == settings:
            return [f"fits: {needed}"], settings
    except SettingsError as error:
        return [f"does not fit: {needed}", str(error)], None
    lines = fit_lines(fitted, costs, memory_bytes)
    if card is None:
        return [f"fits: training with {option}: {_needed_text(fitted.memory)}, {room}", *lines], fitted.settings
    return [f"does not fit: {needed}", *lines, f"train {option} chooses these options"], fitted.settings


def _needed_text(memory: "GpuMemory") -> str:
    return f"{needed_text(memory)} at {counted(memory.batch_size, 'row')} at once"


def _way(settings: "TrainSettings", costs: "Costs", rate_flops: float | None) -> dict[str, Any]:
    stages = [_stage(settings, stage, costs, rate_flops) for stage in settings.stages]
    replaying = sorted((stage for stage in settings.stages if stage.replays), key=lambda stage: not stage.predicts)
    main = replaying[0] if replaying else settings.stages[-1]
    name = costs.names(main)[0]
    # The cost of the vision loss is estimated even if no stage has that loss, where there are trajectories.
    vision = main.model_copy(update={"loss": "vision"}) if costs.backbones else main
    replayed = main if main.replays else vision
    seconds = _seconds(settings, replayed, costs, rate_flops)
    return {
        "flop_per_sample": costs.step_flops(settings, vision) / main.batch_size if vision.replays else None,
        "gpu_memory": memory_facts(costs.memory(settings)),
        "host_memory_bytes": costs.host_bytes(settings),
        "pinned_bytes": costs.pinned_bytes(settings),
        "stages": stages,
        "hours": _sum([stage["hours"] for stage in stages]),
        "pretrain_hours": _sum([stage["hours"] for stage in stages if not LOSSES[stage["loss"]].predicts], rate_flops),
        "vision_hours": _sum([stage["hours"] for stage in stages if LOSSES[stage["loss"]].predicts], rate_flops),
        "seconds_per_step": seconds,
        "paper_recipe_hours": _paper_hours(settings, vision, costs, rate_flops),
        **_reading(costs.manifests[name], replayed, seconds),
    }


def _paper_hours(settings: "TrainSettings", vision: "Stage", costs: "Costs", rate_flops: float | None) -> float | None:
    """Hours of the paper's steps; None without a rate or without trajectories."""
    if rate_flops is None or not costs.backbones:
        return None
    first, student = next(iter(costs.backbones.values())), 3 * costs.student.forward_flops
    flops = (first.training_flops(settings.memory) + student) * PAPER_BATCH * PAPER_STEPS
    copies = costs.step_copy_seconds(settings, vision) * PAPER_BATCH / vision.batch_size * PAPER_STEPS / 3600
    return max(hours_of(flops, rate_flops, 1) or 0.0, copies)


def _seconds(settings: "TrainSettings", stage: "Stage", costs: "Costs", rate_flops: float | None) -> float | None:
    """Seconds of an optimizer step; the copies of streamed blocks overlap with computation."""
    if rate_flops is None:
        return None
    return max(costs.step_flops(settings, stage) / rate_flops, costs.step_copy_seconds(settings, stage))


def _stage(settings: "TrainSettings", stage: "Stage", costs: "Costs", rate_flops: float | None) -> dict[str, Any]:
    seconds = _seconds(settings, stage, costs, rate_flops)
    steps, hours = stage.steps, None
    if stage.budget_share is not None and settings.time_budget_seconds is not None:
        share_seconds = settings.time_budget_seconds * stage.budget_share
        hours = share_seconds / 3600
        steps = None if seconds is None else max(1, int(share_seconds / seconds))
    elif steps is not None and seconds is not None:
        hours = steps * seconds / 3600
    return {
        "name": stage.name,
        "loss": stage.loss,
        "caches": {
            name: None if (manifest := costs.manifests[name]).is_text else manifest.sampling.height
            for name in costs.names(stage)
        },
        "steps": steps,
        "budget_share": stage.budget_share,
        "batch_size": stage.batch_size,
        "grad_accum_steps": stage.grad_accum_steps,
        "timesteps_per_sample": stage.timesteps_per_sample,
        "flop_per_step": costs.step_flops(settings, stage),
        "seconds_per_step": seconds,
        "hours": hours,
    }


def _sum(hours: list[float | None], rate_flops: float | None = 1.0) -> float | None:
    known = [value for value in hours if value is not None]
    return sum(known) if len(known) == len(hours) and rate_flops is not None else None


def _reading(manifest: "Manifest", stage: "Stage", seconds: float | None) -> dict[str, Any]:
    """Bytes per second that training uses, and that it reads without reuse.

    It uses a latent and the recorded prediction of each row, for the depth loss a latent and the teacher's embedding.
    Rows that do not share the student's forward pass belong to other trajectories, each decoded from its first step.
    """
    sizes = {size.name: size for size in cache_sizes(manifest)}
    if manifest.is_text:
        embedding = sizes["encoder_hidden_states"]
        return _rates(embedding.row_bytes, embedding.stored_high_bytes / max(1, embedding.rows), stage, seconds)
    latent_bytes = sizes["final_latent"].row_bytes
    whole = [size for name, size in sizes.items() if name in ("velocity", "noise", "hidden_states", "final_latent")]
    stored = sum(size.stored_high_bytes for size in whole) / max(1, whole[0].rows)
    target_bytes = latent_bytes
    if not stage.predicts:
        target_bytes = sizes["encoder_hidden_states"].row_bytes
        stored += sizes["encoder_hidden_states"].stored_high_bytes / max(1, sizes["encoder_hidden_states"].rows)
    return _rates(latent_bytes + target_bytes, stored / stage.timesteps_per_sample, stage, seconds)


def _rates(used_row_bytes: float, read_row_bytes: float, stage: "Stage", seconds: float | None) -> dict[str, Any]:
    per_second = None if seconds is None else 1 / seconds
    used, read = used_row_bytes * stage.batch_size, read_row_bytes * stage.batch_size
    return {
        "used_bytes_per_step": used,
        "used_bytes_per_second": None if per_second is None else used * per_second,
        "read_bytes_per_step": read,
        "read_bytes_per_second": None if per_second is None else read * per_second,
    }

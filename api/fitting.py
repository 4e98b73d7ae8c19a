"""`--max-gpu-memory`: options that make a run fit into GPU memory, and advice for a run that ran out of it."""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secondcast.models.memory.limit import GIB, free_bytes, installed_quantizers
from secondcast.storage_schemas.errors import OutOfMemoryError, SecondcastError, SettingsError
from secondcast.storage_schemas.progress import counted

if TYPE_CHECKING:
    from secondcast.models.cost.gpu_memory import GpuMemory
    from secondcast.trainer.cost.fitting import Fitted
    from secondcast.trainer.cost.stage_cost import Costs
    from secondcast.trainer.distributed.processes import Distributed
    from secondcast.trainer.settings import TrainSettings

# A run that has started keeps these, because its weights depend on them.
_OF_A_BEGUN_RUN = ("grad_accum_steps", "quantize", "modulation", "compile")


def fit_run(
    asked: "TrainSettings",
    make_costs: "Callable[..., Costs]",
    *,
    max_gpu_memory: str,
    run: Path,
    processes: "Distributed",
    held: Collection[str],
    say: Callable[[str], None],
    decoding_bytes: int = 0,
) -> "TrainSettings":
    """The run with options that fit the GPU of every process; reports them with reasons. Called by all processes.

    A run that has started keeps the options that its weights depend on. make_costs takes local_ranks, as costs_of does.

    decoding_bytes: what --sample-every takes in place of the activations of a step, while it decodes.
    """
    from secondcast.trainer.settings import TrainSettings

    memory_bytes = -processes.largest([-free_bytes(max_gpu_memory, processes.device)])[0]
    local_ranks = processes.on_this_machine()

    def choose() -> str:
        costs = make_costs(local_ranks=local_ranks)
        fitted = _fitted(asked, costs, run, memory_bytes, held)
        _check_room_to_decode(fitted.memory, decoding_bytes, memory_bytes)
        for line in fit_lines(fitted, costs, memory_bytes):
            say(line)
        return fitted.settings.model_dump_json()

    return TrainSettings.model_validate_json(processes.broadcast_from_rank0(choose))


def _fitted(
    asked: "TrainSettings",
    costs: "Costs",
    run: Path,
    memory_bytes: float,
    held: Collection[str],
) -> "Fitted":
    from secondcast.models.memory.host_memory import free_host_bytes
    from secondcast.trainer.cost.fitting import fit as fitting

    started = _begun(run, asked, held)
    if started is not None:
        asked, held = started, {*held, *_OF_A_BEGUN_RUN}
    try:
        return fitting(
            asked, costs, memory_bytes=memory_bytes, host_bytes=free_host_bytes(), held=held,
            quantizers=installed_quantizers(),
        )  # fmt: skip
    except SettingsError as error:
        if started is None:
            raise
        raise SettingsError(
            f"{run} has started and keeps its --grad-accum-steps and --quantize; with these {error}; or use a new run "
            f"folder"
        ) from error


def _check_room_to_decode(memory: "GpuMemory", decoding_bytes: int, memory_bytes: float) -> None:
    from secondcast.models.cost.gpu_memory import with_margin

    more = max(0, decoding_bytes - memory.activations_bytes)
    if more and (needed := with_margin(memory.total_bytes + more)) > memory_bytes:
        raise SettingsError(
            f"--sample-every needs {decoding_bytes / GIB:.1f} GiB for the VAE, and with the weights and the student of "
            f"this run {needed / GIB:.1f} GiB, but --max-gpu-memory leaves {memory_bytes / GIB:.1f} GiB: remove "
            f"--sample-every, or give --quantize or --gpu-blocks to make room"
        )


def fit_lines(fitted: "Fitted", costs: "Costs", memory_bytes: float) -> list[str]:
    """Lines with the chosen options, the memory they need, and why no better ones are chosen."""
    memory = fitted.memory
    parts = (
        f"weights {memory.weights_bytes / GIB:.1f}, student and AdamW {memory.student_bytes / GIB:.1f}, activations of "
        f"{counted(memory.batch_size, 'row')} {memory.activations_bytes / GIB:.1f}, CUDA {memory.cuda_bytes / GIB:.1f}"
    )
    room, needed = f"{memory_bytes / GIB:.1f} GiB", f"{memory.total_bytes / GIB:.1f} GiB by calculation"
    lines = [f"to fit into {room}: {fitted.flags}, {needed} ({parts})"]
    if fitted.reasons:
        lines.append(f"why: {'; '.join(fitted.reasons)}")
    pinned = costs.pinned_bytes(fitted.settings)
    if pinned:
        lines.append(f"streamed blocks use {pinned / GIB:.1f} GiB of pinned host memory; the results stay exact")
    if fitted.settings.quantize != "none":
        lines.append("quantized weights are a biased target: the replay error measures the bias")
    return lines


def out_of_memory(
    asked: "TrainSettings", make_costs: "Callable[[], Costs]", run: Path, *, recipe: bool
) -> OutOfMemoryError:
    """The error for a run that ran out of GPU memory: it names the flag that helps next.

    recipe: whether the stages, and so their --grad-accum-steps, come from a recipe.
    """
    from secondcast.models.student.folder import checkpoints
    from secondcast.trainer.cost.fitting import helping_flag

    started = bool(checkpoints(run))
    kept = "; checkpoints are kept" if started else ""
    try:
        costs = make_costs()
        flag = helping_flag(asked, costs, held=_OF_A_BEGUN_RUN if started else ())
        needed = f", {costs.memory(asked).total_bytes / GIB:.1f} GiB by calculation"
    except SecondcastError:
        flag, needed = ("--activation-checkpointing 1" if asked.activation_checkpointing != 1 else None), ""
    if flag is None:
        fix = "use a smaller student, a cache with fewer pixels or text tokens, or a larger GPU"
    elif recipe and flag.startswith("--grad-accum-steps"):
        key = flag.removeprefix("--").replace(" ", " = ", 1)
        fix = f"write {key} into the recipe, or give --max-gpu-memory auto to choose it"
    else:
        fix = f"also give {flag}, or --max-gpu-memory auto to choose options"
    return OutOfMemoryError(
        f"the GPU is out of memory (the run needs {needed.removeprefix(', ') or 'more'}): {fix}{kept}"
    )


def _begun(run: Path, asked: "TrainSettings", held: Collection[str]) -> "TrainSettings | None":
    """Settings with the recorded grad_accum_steps and quantize of a started run, unless given; None for other runs."""
    from secondcast.trainer.run.folder import recorded_settings

    recorded = recorded_settings(run)
    if recorded is None or len(recorded.stages) != len(asked.stages):
        return None
    stages = tuple(
        stage
        if {"grad_accum_steps", f"grad_accum_steps {stage.name}"} & set(held)
        else stage.model_copy(update={"grad_accum_steps": before.grad_accum_steps})
        for stage, before in zip(asked.stages, recorded.stages, strict=True)
    )
    quantize = asked.quantize if {"quantize", "gpu_blocks"} & set(held) else recorded.quantize
    return asked.model_copy(update={"stages": stages, "quantize": quantize})


def stated_options(settings: "TrainSettings", given: Mapping[str, Any] | None) -> set[str]:
    """Options that fit() must not choose: the given flags, or for a recipe the options that it states."""
    from secondcast.trainer.cost.fitting import TUNABLE_OPTIONS

    if given is not None:
        return set(given) & set(TUNABLE_OPTIONS)
    of_stages = {
        f"grad_accum_steps {stage.name}" for stage in settings.stages if "grad_accum_steps" in stage.model_fields_set
    }
    return settings.model_fields_set & set(TUNABLE_OPTIONS) | of_stages

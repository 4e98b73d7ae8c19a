"""Choose options that make a run fit into GPU memory, and the flag that helps a run that did not fit.

The memory is calculated, not measured. The first of these that fits is chosen: the exact weights on the GPU, with as
few recomputed blocks as possible, then with fewer rows at once; the exact weights streamed from the host; int8; NF4.
Exact weights come first because a quantized backbone is a biased target. Streaming comes last of the exact ones
because each part of a batch copies all streamed weights. See docs/decisions.md.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter

from secondcast.models.cost.gpu_memory import GpuMemory
from secondcast.models.memory.options import MemoryOptions
from secondcast.storage_schemas.errors import SettingsError
from secondcast.trainer.cost.stage_cost import Costs
from secondcast.trainer.settings import TrainSettings

_GIB = 2**30
# In the order in which they are tried: the most accurate first.
_QUANTIZED = ("int8", "nf4")
# Options that fit() chooses, except those in `held`.
TUNABLE_OPTIONS = ("activation_checkpointing", "grad_accum_steps", "gpu_blocks", "quantize")


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """Settings that fit, the memory they need, their flags, and the reasons against the preferred alternatives."""

    settings: TrainSettings
    memory: GpuMemory
    flags: str
    reasons: tuple[str, ...]


def fit(
    settings: TrainSettings,
    costs: Costs,
    *,
    memory_bytes: float,
    host_bytes: float | None = None,
    held: Collection[str] = (),
    quantizers: Collection[str] = _QUANTIZED,
) -> Fitted:
    """The first alternative that fits into GPU memory and, if blocks are streamed, into host memory.

    memory_bytes: GPU memory.
    host_bytes: free host memory of the machine; None if unknown.
    held: options of CHOSEN that must not change; "grad_accum_steps NAME": of that stage.
    quantizers: installed kinds of quantization.

    Caches that were sampled with quantized weights are only replayed with the same weights.
    Raises SettingsError with the smallest memory found if nothing fits.
    """
    asked, reasons = settings, list[str]()
    settings, held = _as_sampled(settings, costs, held)
    least: GpuMemory | None = None
    for why, ways in _families(settings, costs, held, quantizers):
        smallest, least_host = None, None
        for way in ways:
            memory = costs.memory(way)
            smallest = min(smallest or memory, memory, key=attrgetter("needed_bytes"))
            if memory.needed_bytes > memory_bytes:
                continue
            # Unpinned memory is reclaimed by the system, or does not depend on the options here.
            needs_host = costs.local_ranks * costs.host_bytes(way) if costs.pinned_bytes(way) else 0
            if host_bytes is None or needs_host <= host_bytes:
                return Fitted(settings=way, memory=memory, flags=flags_of(asked, way), reasons=tuple(reasons))
            least_host = min(least_host or needs_host, needs_host)
        if least_host is not None and host_bytes is not None:
            free = f"{host_bytes / _GIB:.1f} GiB are free"
            reasons.append(f"{why} need {least_host / _GIB:.1f} GiB of host memory, {free}")
        elif smallest is not None:
            reasons.append(f"{why} need {smallest.needed_bytes / _GIB:.1f} GiB or more")
            least = min(least or smallest, smallest, key=attrgetter("needed_bytes"))
    untried = _untried(settings, held, quantizers)
    raise _nothing_fits(memory_bytes, [*reasons, *untried], least or costs.memory(settings))


def _untried(settings: TrainSettings, held: Collection[str], quantizers: Collection[str]) -> list[str]:
    missing = [kind for kind in _QUANTIZED if kind not in quantizers]
    if not missing or not settings.replays or {"quantize", "gpu_blocks"} & set(held):
        return []
    return [f"{' and '.join(missing)} weights are not tried without pip install 'secondcast[quant]'"]


def _nothing_fits(memory_bytes: float, reasons: Sequence[str], least: GpuMemory) -> SettingsError:
    return SettingsError(
        f"nothing fits into {memory_bytes / _GIB:.1f} GiB: {'; '.join(reasons)}. The student and AdamW need "
        f"{least.student_bytes / _GIB:.1f} GiB and each row {least.sample_bytes / _GIB:.2f} GiB: use a smaller "
        "student, a cache with fewer pixels or text tokens, or a larger GPU"
    )


def flags_of(asked: TrainSettings, way: TrainSettings) -> str:
    """The flags in which settings differ from the given ones, with the grad_accum_steps of each changed stage."""
    found = [
        f"--{name.replace('_', '-')} {getattr(way, name)}"
        for name in ("activation_checkpointing", "gpu_blocks", "quantize")
        if getattr(way, name) != getattr(asked, name)
    ]
    for before, now in zip(asked.stages, way.stages, strict=True):
        if before.grad_accum_steps != now.grad_accum_steps:
            found.append(
                f"--grad-accum-steps {now.grad_accum_steps}" + (f" in stage {now.name}" if len(way.stages) > 1 else "")
            )
    return " ".join(found) or "no change"


def helping_flag(settings: TrainSettings, costs: Costs, *, held: Collection[str] = ()) -> str | None:
    """The next flag that helps a run that ran out of memory; None if only a smaller student helps.

    held: options that a started run cannot change.
    """
    larger = _divided(settings, costs, 2, held)
    replays = settings.replays
    if replays and settings.modulation == "gpu" and costs.table_rows is not None and "modulation" not in held:
        return "--modulation auto"
    if replays and settings.activation_checkpointing != 1 and settings.gpu_blocks is None:
        return "--activation-checkpointing 1"
    if larger is not None:
        return flags_of(settings, larger)
    if replays and settings.quantize == "none" and settings.gpu_blocks != 0:
        resident = costs.loaded(settings).blocks if settings.gpu_blocks is None else settings.gpu_blocks
        return f"--gpu-blocks {resident // 2}"
    if replays and settings.quantize in ("int8", "fp8") and "quantize" not in held:
        return "--quantize nf4"
    return None


def _as_sampled(settings: TrainSettings, costs: Costs, held: Collection[str]) -> tuple[TrainSettings, Collection[str]]:
    """The settings with the quantization that the caches were sampled with, if any, and the options that are held."""
    first = next(iter(costs.manifests.values()))
    kind = "none" if first.is_text else first.sampling.quantize
    if kind != "none" and not {"quantize", "gpu_blocks"} & set(held) and settings.replays:
        settings, held = settings.model_copy(update={"quantize": kind}), {*held, "quantize"}
    if settings.quantize in ("int8", "fp8") and "activation_checkpointing" not in held:
        settings = settings.model_copy(update={"activation_checkpointing": 1})
    # The given options may conflict with the weights of the caches, or of a started run.
    MemoryOptions.from_flags(**{name: getattr(settings, name) for name in MemoryOptions.model_fields})
    return settings, held


def _families(
    settings: TrainSettings, costs: Costs, held: Collection[str], quantizers: Collection[str]
) -> Iterator[tuple[str, Iterator[TrainSettings]]]:
    """Alternatives for the backbone's weights, best first: their name, and settings, fastest first."""
    if not settings.replays:
        yield "the student's steps", _by_rows(settings, costs, held, (settings.activation_checkpointing,))
        return
    if "gpu_blocks" in held or "quantize" in held:
        named = f"weights with --quantize {settings.quantize}" if settings.quantize != "none" else "the exact weights"
        streams = settings.gpu_blocks is not None
        yield (
            f"{named}, {settings.gpu_blocks} blocks on the GPU," if streams else named,
            _by_rows(settings, costs, held, _fewest_first(settings, costs, held)),
        )
        if settings.quantize != "none" or "gpu_blocks" in held:
            return
    else:
        yield "the exact weights", _by_rows(settings, costs, held, _fewest_first(settings, costs, held))
    if "gpu_blocks" not in held and not ("activation_checkpointing" in held and settings.activation_checkpointing > 1):
        yield "streamed blocks", _streamed(settings, costs, held)
    if "quantize" in held:
        return
    for kind in quantizers:
        quantized = settings.model_copy(update={"quantize": kind, "activation_checkpointing": 1})
        if "activation_checkpointing" in held and settings.activation_checkpointing != 1:
            continue
        yield f"{kind} weights", _by_rows(quantized, costs, held, (1,))


def _fewest_first(settings: TrainSettings, costs: Costs, held: Collection[str]) -> Sequence[int]:
    """Values of --activation-checkpointing, starting with the one that recomputes the fewest blocks."""
    if "activation_checkpointing" in held or settings.quantize in ("int8", "fp8"):
        return (settings.activation_checkpointing,)
    if settings.gpu_blocks is not None:
        return (1,)
    return (0, *range(costs.loaded(settings).blocks, 0, -1))


def _by_rows(
    settings: TrainSettings, costs: Costs, held: Collection[str], checkpoints: Sequence[int]
) -> Iterator[TrainSettings]:
    for divided in _ever_fewer_rows(settings, costs, held):
        for every in checkpoints:
            yield divided.model_copy(update={"activation_checkpointing": every})


def _streamed(settings: TrainSettings, costs: Costs, held: Collection[str]) -> Iterator[TrainSettings]:
    every = settings.activation_checkpointing if "activation_checkpointing" in held else 1
    for divided in _ever_fewer_rows(settings, costs, held):
        for resident in range(costs.loaded(settings).blocks - 1, -1, -1):
            yield divided.model_copy(update={"activation_checkpointing": every, "gpu_blocks": resident})


def _ever_fewer_rows(settings: TrainSettings, costs: Costs, held: Collection[str]) -> Iterator[TrainSettings]:
    divided: TrainSettings | None = settings
    while divided is not None:
        yield divided
        divided = _divided(divided, costs, 1, held)


def _divided(settings: TrainSettings, costs: Costs, by: int, held: Collection[str]) -> TrainSettings | None:
    """Split the largest stage into at least `by` times as many parts (at least one more); None if not possible."""
    largest = max(settings.stages, key=lambda stage: costs.stage_memory(settings, stage).total_bytes)
    if {"grad_accum_steps", f"grad_accum_steps {largest.name}"} & set(held):
        return None
    whole = largest.batch_size // (costs.ranks * largest.timesteps_per_sample)
    for parts in range(max(largest.grad_accum_steps + 1, by * largest.grad_accum_steps), whole + 1):
        if whole % parts == 0:
            divided = largest.model_copy(update={"grad_accum_steps": parts})
            stages = tuple(divided if stage is largest else stage for stage in settings.stages)
            return settings.model_copy(update={"stages": stages})
    return None

"""Which options make a run fit into so much GPU memory, and which flag helps a run that did not fit.

By calculation. Tried in this order, and the first that fits is taken: the exact weights whole on the GPU, with as few
blocks computed twice as possible, then with fewer rows at once; the exact weights streamed from the host; int8; NF4.
Exact ones first, for a quantized backbone is a biased target; rows first, for all weights are read for each part of
a batch, which fewer rows hide less well. docs/decisions.md.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from secondcast.models.cost.gpu_memory import GpuMemory
from secondcast.models.memory.options import MemoryOptions
from secondcast.storage_schemas.errors import SettingsError
from secondcast.trainer.cost.stage_cost import Costs
from secondcast.trainer.settings import TrainSettings

_GIB = 2**30
# Real blocks keep up to this part more than is counted on the meta device (tests/models/cost/test_cost.py).
_UNSEEN = 0.04
# In the order in which they are tried: the more exact first.
_QUANTIZED = ("int8", "nf4")
# Options that fit() chooses; what is held among them stays as it was asked for.
CHOSEN = ("activation_checkpointing", "grad_accum_steps", "gpu_blocks", "quantize")


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """Settings that fit, what they need, the flags that say so, and why none before them in the order did."""

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
    """The first of the ways that fits into so much GPU memory and, where blocks are streamed, so much host memory.

    held: options of CHOSEN that were asked for as they are; "grad_accum_steps NAME": of a stage. host_bytes: of the machine,
    None where it is not known. quantizers: kinds that are installed. Weights are as the caches were sampled with, if
    these are quantized: no other ones replay them. SettingsError, with the least that was found, where nothing fits.
    """
    asked, reasons = settings, list[str]()
    settings, held = _as_sampled(settings, costs, held)
    least: GpuMemory | None = None
    for why, ways in _families(settings, costs, held, quantizers):
        smallest, least_host = None, None
        for way in ways:
            memory = costs.memory(way)
            smallest = min(smallest or memory, memory, key=_needed)
            if _needed(memory) > memory_bytes:
                continue
            # What is not pinned the system takes back, or the options here do not change.
            needs_host = costs.local_ranks * costs.host_bytes(way) if costs.pinned_bytes(way) else 0
            if host_bytes is None or needs_host <= host_bytes:
                return Fitted(settings=way, memory=memory, flags=flags_of(asked, way), reasons=tuple(reasons))
            least_host = min(least_host or needs_host, needs_host)
        if least_host is not None and host_bytes is not None:
            free = f"{host_bytes / _GIB:.1f} are free"
            reasons.append(f"{why} need {least_host / _GIB:.1f} GiB of host memory, {free}")
        elif smallest is not None:
            reasons.append(f"{why} need {_needed(smallest) / _GIB:.1f} GiB or more")
            least = min(least or smallest, smallest, key=_needed)
    untried = _untried(settings, held, quantizers)
    raise _nothing_fits(memory_bytes, [*reasons, *untried], least or costs.memory(settings))


def _untried(settings: TrainSettings, held: Collection[str], quantizers: Collection[str]) -> list[str]:
    missing = [kind for kind in _QUANTIZED if kind not in quantizers]
    if not missing or not settings.replays or {"quantize", "gpu_blocks"} & set(held):
        return []
    return [f"{' and '.join(missing)} weights were not tried: pip install 'secondcast[quant]'"]


def _nothing_fits(memory_bytes: float, reasons: Sequence[str], least: GpuMemory) -> SettingsError:
    return SettingsError(
        f"nothing fits into {memory_bytes / _GIB:.1f} GiB: {'; '.join(reasons)}. Of it the student and AdamW take "
        f"{least.student_bytes / _GIB:.1f} GiB and a row {least.sample_bytes / _GIB:.2f}: take a smaller student, a "
        f"cache of fewer pixels or text tokens, or a larger card"
    )


def flags_of(asked: TrainSettings, way: TrainSettings) -> str:
    """The flags that a way has beyond what was asked for; of stages that are divided, the smallest number of parts."""
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
    return " ".join(found) or "as asked"


def helping_flag(settings: TrainSettings, costs: Costs, *, held: Collection[str] = ()) -> str | None:
    """The flag that would help a run next that ran out of memory; None where only a smaller student would.

    held: options that a begun run cannot change.
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
        resident = costs.blocks if settings.gpu_blocks is None else settings.gpu_blocks
        return f"--gpu-blocks {resident // 2}"
    if replays and settings.quantize in ("int8", "fp8") and "quantize" not in held:
        return "--quantize nf4"
    return None


def _needed(memory: GpuMemory) -> float:
    return memory.total_bytes + _UNSEEN * memory.activations_bytes


def _as_sampled(settings: TrainSettings, costs: Costs, held: Collection[str]) -> tuple[TrainSettings, Collection[str]]:
    """The settings with the weights that the caches were sampled with, where those are quantized; options that hold."""
    kind = next(iter(costs.manifests.values())).sampling.quantize
    if kind != "none" and not {"quantize", "gpu_blocks"} & set(held) and settings.replays:
        settings, held = settings.model_copy(update={"quantize": kind}), {*held, "quantize"}
    if settings.quantize in ("int8", "fp8") and "activation_checkpointing" not in held:
        settings = settings.model_copy(update={"activation_checkpointing": 1})
    # What was asked for may not go with the weights of the caches, or of a begun run.
    MemoryOptions.from_flags(**{name: getattr(settings, name) for name in MemoryOptions.model_fields})
    return settings, held


def _families(
    settings: TrainSettings, costs: Costs, held: Collection[str], quantizers: Collection[str]
) -> Iterator[tuple[str, Iterator[TrainSettings]]]:
    """Ways to hold the backbone, from the best on: what they are called, and settings, from the fastest on."""
    if not settings.replays:
        yield "the student's steps", _by_rows(settings, costs, held, (settings.activation_checkpointing,))
        return
    if "gpu_blocks" in held or "quantize" in held:
        named = f"weights with --quantize {settings.quantize}" if settings.quantize != "none" else "the exact weights"
        streams = settings.gpu_blocks is not None
        yield (
            f"{named}, {settings.gpu_blocks} blocks resident," if streams else named,
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
    """Values of --activation-checkpointing, from the one that computes the fewest blocks twice on."""
    if "activation_checkpointing" in held or settings.quantize in ("int8", "fp8"):
        return (settings.activation_checkpointing,)
    if settings.gpu_blocks is not None:
        return (1,)
    return (0, *range(costs.blocks, 0, -1))


def _by_rows(
    settings: TrainSettings, costs: Costs, held: Collection[str], checkpoints: Sequence[int]
) -> Iterator[TrainSettings]:
    for divided in _ever_fewer_rows(settings, costs, held):
        for every in checkpoints:
            yield divided.model_copy(update={"activation_checkpointing": every})


def _streamed(settings: TrainSettings, costs: Costs, held: Collection[str]) -> Iterator[TrainSettings]:
    every = settings.activation_checkpointing if "activation_checkpointing" in held else 1
    for divided in _ever_fewer_rows(settings, costs, held):
        for resident in range(costs.blocks - 1, -1, -1):
            yield divided.model_copy(update={"activation_checkpointing": every, "gpu_blocks": resident})


def _ever_fewer_rows(settings: TrainSettings, costs: Costs, held: Collection[str]) -> Iterator[TrainSettings]:
    divided: TrainSettings | None = settings
    while divided is not None:
        yield divided
        divided = _divided(divided, costs, 1, held)


def _divided(settings: TrainSettings, costs: Costs, by: int, held: Collection[str]) -> TrainSettings | None:
    """The stage that needs most in at least `by` times as many parts, or one more for 1; None where it cannot be."""
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

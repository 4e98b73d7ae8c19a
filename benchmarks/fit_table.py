"""Which options make FLUX.1-dev fit which card, by calculation: the tables of docs/small-gpus.md.

python -m benchmarks.fit_table            # no GPU, no weights, no network; half a minute

What `--max-gpu-memory` chooses in build, generate and train and `plan` says, for many cards at once. Seconds are the
larger one of the roofline of models/cost/cards.py and of copies at 25 GB/s: assumed.
"""

from collections.abc import Iterator

from secondcast.cache_builder.settings import PlannedBuild
from secondcast.commands.plan.cards import outline
from secondcast.evaluation.pictures.folder import PictureSettings
from secondcast.evaluation.settings.memory import sampling_cost
from secondcast.models.cost.cards import CARDS, COPY_BYTES_PER_SECOND, Card
from secondcast.models.cost.network_costs import BackboneCost
from secondcast.models.cost.placement import SamplingCost, place, sample_stage_cost
from secondcast.models.device import quiet_libraries
from secondcast.models.memory.options import MemoryOptions
from secondcast.storage_schemas.errors import SettingsError
from secondcast.storage_schemas.schema.manifest import Manifest
from secondcast.trainer.cost.fitting import fit
from secondcast.trainer.cost.stage_cost import Costs, costs_of
from secondcast.trainer.settings import TrainFlags, TrainSettings

GIB = 2**30
NAMED = ("RTX 4060", "RTX 4070", "RTX 4060 Ti 16GB", "RTX 4090", "RTX A6000", "A100 80GB", "H100 SXM")
# Student, pixels, text tokens, rows of an optimizer step.
TRAINING = (("base", 512, 77, 4), ("base", 1024, 77, 4), ("base", 512, 512, 4), ("small", 512, 77, 1))
# Command, pixels, batch size.
SAMPLING = (("build", 512, 16), ("build", 1024, 4), ("generate", 512, 4), ("generate", 1024, 1))
STEPS = {"build": 20, "generate": 28}
T5_BASE = 110_000_000
OPTIONS = (
    ("as the paper's loop, from the cache", {"modulation": "gpu"}),
    ("modulation table (the default)", {}),
    ("table, `--activation-checkpointing 1`", {"activation_checkpointing": 1}),
    ("table, half of the blocks streamed", {"activation_checkpointing": 1, "gpu_blocks": 28}),
    ("table, all blocks streamed", {"activation_checkpointing": 1, "gpu_blocks": 0}),
    ("table, `--quantize int8 --activation-checkpointing 1`", {"activation_checkpointing": 1, "quantize": "int8"}),
    ("table, `--quantize nf4 --activation-checkpointing 1`", {"activation_checkpointing": 1, "quantize": "nf4"}),
)


def costs_at(student: str, pixels: int, text_length: int, gpu_bytes: float | None = None) -> Costs:
    manifest: Manifest = outline("FLUX.1-dev", 1000, PlannedBuild(resolution=pixels, text_length=text_length))[0]
    return costs_of({"cache": manifest}, student, gpu_bytes=gpu_bytes)


def asked(batch_size: int, **options: object) -> TrainSettings:
    return TrainFlags.from_flags(student="any", batch_size=batch_size, **options).settings()


def options_rows() -> Iterator[str]:
    """What each option saves: T5-base, 512 px, 77 tokens, at batch 4 and 1."""
    costs = costs_at("base", 512, 77)
    yield "| options | weights, GiB | batch 4: peak, GiB | TFLOP | batch 1: peak, GiB | pinned on the host, GiB |"
    yield "|---|---|---|---|---|---|"
    for name, options in OPTIONS:
        four, one = (asked(batch_size, **options) for batch_size in (4, 1))
        memory = costs.memory(four)
        yield (
            f"| {name} | {memory.weights_bytes / GIB:.1f} | {memory.total_bytes / GIB:.1f} | "
            f"{costs.step_flops(four, four.stages[0]) / 1e12:.0f} | {costs.memory(one).total_bytes / GIB:.1f} | "
            f"{costs.pinned_bytes(four) / GIB:.1f} |"
        )


def card_rows() -> Iterator[str]:
    """What --max-gpu-memory chooses on each card; the last column is for who has it."""
    head = "| card | GiB | command | px | batch | beside `--max-gpu-memory auto` | peak, GiB | s | pinned, GiB "
    yield head + "| measured |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for card in CARDS:
        if card.name not in NAMED:
            continue
        head = f"| {card.name} | {card.memory_gib:g} |"
        for command, pixels, batch_size in SAMPLING:
            found = _placed(_sampling_cost(command, pixels, batch_size), card, command)
            yield f"{head} {command} | {pixels} | {batch_size} | {found} | - |"
        for student, pixels, text_length, batch_size in TRAINING:
            costs = costs_at(student, pixels, text_length, card.memory_gib * GIB)
            tokens = "" if text_length == 77 else f", {text_length} tokens"
            named = f"train, {student}{tokens} | {pixels} | {batch_size}"
            yield f"{head} {named} | {_chosen(costs, card, asked(batch_size))} | - |"


def _sampling_cost(command: str, pixels: int, batch_size: int) -> SamplingCost:
    manifest, folder, _ = outline("FLUX.1-dev", 1000, PlannedBuild(resolution=pixels))
    if command == "build":
        return sample_stage_cost(manifest, batch_size)
    settings = PictureSettings(
        student="base", teacher="FLUX.1-dev", text_length=77, height=pixels, width=pixels, steps=STEPS["generate"],
        schedule="diffusers", guidance=3.5, seed=0, dtype="bfloat16", pooled="zero",
    )  # fmt: skip
    return sampling_cost(settings, folder, batch_size=batch_size, student_parameters=T5_BASE)


def _placed(cost: SamplingCost, card: Card, command: str) -> str:
    asked = MemoryOptions(modulation="gpu" if command == "build" else "auto")
    try:
        found = place(cost, asked, memory_bytes=card.memory_gib * GIB, host_bytes=None)
    except SettingsError:
        return "nothing fits | | | "
    compute = cost.batch_size * cost.backbone.forward_flops / _rate(card, cost.backbone)
    seconds = STEPS[command] * max(compute, found.pinned_bytes / COPY_BYTES_PER_SECOND) / cost.batch_size
    blocks = "" if found.options.gpu_blocks is None else f" --gpu-blocks {found.options.gpu_blocks}"
    return (
        f"`--modulation {found.options.modulation}{blocks}` | {found.memory.total_bytes / GIB:.1f} | "
        f"{_seconds_text(seconds)} | {found.pinned_bytes / GIB:.1f}"
    )


def _chosen(costs: Costs, card: Card, settings: TrainSettings) -> str:
    try:
        fitted = fit(settings, costs, memory_bytes=card.memory_gib * GIB)
    except SettingsError:
        return "nothing fits | | |"
    way, stage = fitted.settings, fitted.settings.stages[0]
    rate = _rate(card, next(iter(costs.backbones.values())))
    seconds = max(costs.step_flops(way, stage) / rate, costs.step_copy_seconds(way, stage))
    flags = fitted.flags if fitted.flags == "no change" else f"`{fitted.flags}`"
    memory_gib, pinned_gib = fitted.memory.total_bytes / GIB, costs.pinned_bytes(way) / GIB
    return f"{flags} | {memory_gib:.1f} | {_seconds_text(seconds)} | {pinned_gib:.1f}"


def _rate(card: Card, backbone: BackboneCost) -> float:
    rate = card.flops_per_s(backbone.moved_bytes / backbone.forward_flops)
    assert rate is not None
    return rate


def _seconds_text(seconds: float) -> str:
    return f"{seconds:.0f}" if seconds >= 10 else f"{seconds:.2g}"


if __name__ == "__main__":
    quiet_libraries()
    for row in (*options_rows(), "", *card_rows()):
        print(row, flush=True)

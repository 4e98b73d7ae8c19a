"""Which options make FLUX.1-dev fit which card, by calculation: the tables of docs/small-gpus.md.

python -m benchmarks.fit_table            # no GPU, no weights, no network; half a minute

What `secondcast train --max-gpu-memory` chooses and `secondcast plan train --gpu CARD` says, for many cards at once.
Seconds are
the larger one of FLOPs at 31 % of the card's dense bf16 rate and of copies at 25 GB/s: assumed (models/cost/cards.py).
"""

from collections.abc import Iterator

from secondcast.cache_builder.settings import PlannedBuild
from secondcast.cache_builder.teacher_models import sampling_cost as build_cost
from secondcast.commands.plan.cards import outline
from secondcast.evaluation.pictures.folder import PictureSettings
from secondcast.evaluation.sampling import sampling_cost as generate_cost
from secondcast.models.cost.cards import CARDS, COPY_BYTES_PER_SECOND, Card
from secondcast.models.cost.placement import SamplingCost, place
from secondcast.models.device import quiet_libraries
from secondcast.models.memory.options import MemoryOptions
from secondcast.storage_schemas.errors import SettingsError
from secondcast.storage_schemas.schema.manifest import Manifest
from secondcast.trainer.cost.fitting import fit
from secondcast.trainer.cost.stage_cost import Costs, costs_of
from secondcast.trainer.settings import TrainFlags, TrainSettings

GIB = 2**30
NAMED = ("RTX 4060", "RTX 3060 12GB", "RTX 4070", "RTX 4060 Ti 16GB", "RTX 4090", "RTX 5090", "H100 SXM")
# Student, pixels, text tokens, rows of an optimizer step.
SHAPES = (("base", 512, 77, 4), ("base", 1024, 77, 4), ("base", 512, 512, 4), ("small", 512, 77, 1))
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
    head = "| card | GiB | student | px | text tokens | batch | flags | peak, GiB | s per step | host, GiB "
    yield head + "| measured or emulated |"
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    for student, pixels, text_length, batch_size in SHAPES:
        for card in CARDS:
            if card.name in NAMED:
                costs = costs_at(student, pixels, text_length, card.memory_gib * GIB)
                head = f"| {card.name} | {card.memory_gib:.0f} | {student} | {pixels} | {text_length} | {batch_size} |"
                yield f"{head} {_chosen(costs, card, asked(batch_size))} | - |"


def sampling_rows() -> Iterator[str]:
    """What --max-gpu-memory chooses for build and generate; memory less 0.5 GiB and 4 % for what is not counted."""
    yield "| card | GiB | command | px | batch | flags | peak, GiB | s per row | pinned, GiB | measured |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for command, pixels, batch_size in SAMPLING:
        for card in CARDS:
            if card.name in NAMED:
                found = _placed(_sampling_cost(command, pixels, batch_size), card, command)
                yield f"| {card.name} | {card.memory_gib:.0f} | {command} | {pixels} | {batch_size} | {found} | - |"


def _sampling_cost(command: str, pixels: int, batch_size: int) -> SamplingCost:
    manifest, folder, _ = outline("FLUX.1-dev", 1000, PlannedBuild(resolution=pixels))
    if command == "build":
        return build_cost(manifest, batch_size)
    settings = PictureSettings(
        student="base", teacher="FLUX.1-dev", text_length=77, height=pixels, width=pixels, steps=STEPS["generate"],
        schedule="diffusers", guidance=3.5, seed=0, dtype="bfloat16", pooled="zero",
    )  # fmt: skip
    return generate_cost(settings, folder, batch_size=batch_size, student_parameters=T5_BASE)


def _placed(cost: SamplingCost, card: Card, command: str) -> str:
    usable, steps = 0.96 * card.memory_gib - 0.5, STEPS[command]
    asked = MemoryOptions(modulation="gpu" if command == "build" else "auto")
    try:
        found = place(cost, asked, memory_bytes=usable * GIB, host_bytes=None)
    except SettingsError:
        return "nothing fits | | | "
    assert card.achieved_flops_per_s is not None
    compute = cost.batch_size * cost.backbone.forward_flops / card.achieved_flops_per_s
    seconds = steps * max(compute, found.pinned_bytes / COPY_BYTES_PER_SECOND) / cost.batch_size
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
    assert card.achieved_flops_per_s is not None
    seconds = max(costs.step_flops(way, stage) / card.achieved_flops_per_s, costs.step_copy_seconds(way, stage))
    flags = fitted.flags if fitted.flags == "no change" else f"`{fitted.flags}`"
    memory_gib, host_gib = fitted.memory.total_bytes / GIB, costs.host_bytes(way) / GIB
    return f"{flags} | {memory_gib:.1f} | {_seconds_text(seconds)} | {host_gib:.0f}"


def _seconds_text(seconds: float) -> str:
    return f"{seconds:.0f}" if seconds >= 10 else f"{seconds:.2g}"


if __name__ == "__main__":
    quiet_libraries()
    for row in (*options_rows(), "", *card_rows(), "", *sampling_rows()):
        print(row, flush=True)

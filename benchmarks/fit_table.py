"""Which options make FLUX.1-dev fit which card, by calculation: the tables of docs/small-gpus.md.

python -m benchmarks.fit_table            # no GPU, no weights, no network; half a minute

What `secondcast train --max-gpu-memory` chooses and `secondcast plan train --gpu CARD` says, for many cards at once.
Seconds are
the larger one of FLOPs at 31 % of the card's dense bf16 rate and of copies at 25 GB/s: assumed (models/cost/cards.py).
"""

from collections.abc import Iterator

from secondcast.commands.plan.cards import outline
from secondcast.models.cost.cards import CARDS, Card
from secondcast.models.device import quiet_libraries
from secondcast.storage_schemas.errors import SettingsError
from secondcast.storage_schemas.schema.manifest import Manifest
from secondcast.trainer.cost.fitting import fit
from secondcast.trainer.cost.stage_cost import Costs, costs_of
from secondcast.trainer.settings import TrainFlags, TrainSettings

GIB = 2**30
NAMED = ("RTX 4060", "RTX 3060 12GB", "RTX 4070", "RTX 4060 Ti 16GB", "RTX 4090", "RTX 5090", "H100 SXM")
# Student, pixels, text tokens, rows of an optimizer step.
SHAPES = (("base", 512, 77, 4), ("base", 1024, 77, 4), ("base", 512, 512, 4), ("small", 512, 77, 1))
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
    manifest: Manifest = outline("FLUX.1-dev", 1000, {"resolution": pixels, "text_length": text_length})[0]
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


def _chosen(costs: Costs, card: Card, settings: TrainSettings) -> str:
    try:
        fitted = fit(settings, costs, memory_bytes=card.memory_gib * GIB)
    except SettingsError:
        return "nothing fits | | |"
    way, stage = fitted.settings, fitted.settings.stages[0]
    assert card.achieved_flops_per_s is not None
    seconds = max(costs.step_flops(way, stage) / card.achieved_flops_per_s, costs.step_copy_seconds(way, stage))
    flags = fitted.flags if fitted.flags == "no change" else f"`{fitted.flags}`"
    told = f"{seconds:.0f}" if seconds >= 10 else f"{seconds:.2g}"
    return f"{flags} | {fitted.memory.total_bytes / GIB:.1f} | {told} | {costs.host_bytes(way) / GIB:.0f}"


if __name__ == "__main__":
    quiet_libraries()
    for row in (*options_rows(), "", *card_rows()):
        print(row, flush=True)

"""What the plans of generating and evaluating share: whether sampling fits a GPU, and its row of figures."""

import contextlib
from typing import TYPE_CHECKING, Annotated, Any

import typer

from secondcast.commands.plan.build_rows import LARGER_CARD, needed_text
from secondcast.commands.plan.cards import figure_table, print_figures
from secondcast.models.families.registry import usual_students
from secondcast.models.memory.options import MemoryOptions
from secondcast.storage_schemas.errors import SettingsError

if TYPE_CHECKING:
    from secondcast.models.cost.cards import Card
    from secondcast.models.cost.placement import SamplingCost

_GIB = 2**30

PlannedStudent = Annotated[
    str | None,
    typer.Option(help=f"Student: small, base, large or xl, or the folder of an encoder. Default: {usual_students()}."),
]


def sampling_verdict(
    what: str, cost: "SamplingCost", options: MemoryOptions, *, card: "Card | None", memory_bytes: float
) -> str:
    """Whether sampling fits into GPU memory, and the fix if not; `what` names the command's work.

    memory_bytes: of the card, or the limit that goes before it.
    """
    from secondcast.models.cost.placement import place

    needed = needed_text(cost.memory(options))
    there = "the limit is" if card is None else f"{card.name} has"
    stated = f"{what}: {needed} at batch {cost.batch_size}, {there} {memory_bytes / _GIB:.1f} GiB"
    with contextlib.suppress(SettingsError):
        found = place(cost, options, memory_bytes=memory_bytes, host_bytes=None)
        if found.memory == cost.memory(options):
            return f"fits: {stated}"
        return f"does not fit: {stated}; --max-gpu-memory {memory_bytes / _GIB:.4g}GiB fits: {found.flags}"
    return f"does not fit: {stated}: give a smaller --batch-size, smaller images, --quantize nf4, or {LARGER_CARD[4:]}"


def print_sampling(compute: dict[str, str], memory: dict[str, Any]) -> None:
    """Print a row: columns of computation, then GPU memory as of memory_facts."""
    table = figure_table("", *compute, "weights\nGiB", "activations\nGiB", "total GiB,\ncalculated")
    table.add_row(
        f"batch {memory['batch_size']}", *compute.values(), f"{memory['weights_bytes'] / _GIB:.2f}",
        f"{memory['activations_bytes'] / _GIB:.2f}", f"{memory['total_bytes'] / _GIB:.2f}",
    )  # fmt: skip
    print_figures(table)

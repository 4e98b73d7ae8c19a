"""What `secondcast build --pilot` prints."""

from typing import TYPE_CHECKING

import typer

from secondcast.commands.shell.console import PlainTable, print_line, print_table
from secondcast.storage_schemas.progress import duration_text, size_text

if TYPE_CHECKING:
    from secondcast.cache_builder.checks.pilot import Measured, PilotResult
    from secondcast.models.memory.peak import PeakMemory

BROKEN = 1
_ROWS = (
    "prompts, trajectories",
    "seconds per row",
    "stored / raw bytes",
    "peak host memory",
    "peak GPU memory",
    "whole build",
    "whole build, on disk",
)
_VERDICT = {True: "holds", False: "BROKEN", None: "-"}


def print_pilot(result: "PilotResult") -> None:
    """Print the tables of a pilot build; exit with code 1 if an invariant is broken."""
    table = PlainTable("", "text", "sample")
    cells = [_cells(measured, result.peaks.get(stage)) for stage, measured in _stages(result)]
    for name, *values in zip(_ROWS, *cells, strict=True):
        table.add_row(name, *values)
    print_table(table)
    for check in result.checks:
        print_line(f"invariant {check.invariant} {_VERDICT[check.holds]}: {check.description}")
    seconds = result.text.total_seconds + result.sample.total_seconds
    print_line(
        f"{result.location}: the whole build takes about {duration_text(seconds)} on one worker like this one, and "
        f"{size_text(result.total_bytes)}; run the command without --pilot to resume from here",
    )
    if not result.holds:
        print_line(
            "this device, dtype, batch size or attention backend does not reproduce the teacher's pipeline: try "
            "--attention-backend native, another --batch-size, or --latents stored if invariant 2 is the broken one",
        )
        raise typer.Exit(BROKEN)


def _stages(result: "PilotResult") -> tuple[tuple[str, "Measured"], ...]:
    return (("text", result.text), ("sample", result.sample))


def _cells(measured: "Measured", peak: "PeakMemory | None") -> tuple[str, ...]:
    gpu = "-" if peak is None or peak.gpu_bytes is None else size_text(peak.gpu_bytes)
    return (
        f"{measured.rows:,} of {measured.planned_rows:,}",
        f"{measured.seconds_per_row:.4f}",
        f"{measured.ratio:.3f}",
        "-" if peak is None else size_text(peak.host_bytes),
        gpu,
        duration_text(measured.total_seconds),
        size_text(measured.total_bytes),
    )

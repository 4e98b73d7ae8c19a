"""The table of one or several checks, as Markdown and as text."""

from collections.abc import Sequence

from secondcast.check.results import CheckResults, CheckRow, Machine, row_names
from secondcast.storage_schemas.progress import size_text

_GIB = 2**30


def figures_text(row: CheckRow) -> str:
    """The figures of a row in one line; empty if it has none."""
    parts = []
    if row.step_seconds is not None:
        parts.append(f"{1000 * row.step_seconds:.0f} ms per step")
    if row.matrix_rate_fraction is not None:
        parts.append(f"{row.matrix_rate_fraction:.0%} of the matrix rate")
    if row.picture_seconds is not None and row.text_seconds is not None:
        parts.append(f"{row.picture_seconds:.2f} s, {1000 * row.text_seconds:.0f} ms of them for the text")
    if row.peak_bytes is not None and row.reserved_bytes is not None:
        planned = "" if row.planned_bytes is None else f", planned {row.planned_bytes / _GIB:.2f}"
        parts.append(f"{row.peak_bytes / _GIB:.2f} GiB allocated{planned}, {row.reserved_bytes / _GIB:.2f} reserved")
    return "; ".join(parts)


def row_text(row: CheckRow) -> str:
    """A row in one line."""
    return "; ".join(filter(None, (row.detail, figures_text(row))))


def machine_text(machine: Machine) -> str:
    """A machine in one line."""
    parts = [machine.device]
    if machine.total_bytes is not None:
        parts.append(size_text(machine.total_bytes))
    parts += [f"torch {machine.torch}", f"diffusers {machine.diffusers}", f"transformers {machine.transformers}"]
    if machine.driver is not None:
        parts.append(f"driver {machine.driver}")
    if machine.cudnn is not None:
        parts.append(f"cuDNN {machine.cudnn}")
    else:
        parts.append(f"{machine.threads} threads")
    parts.append(f"{machine.matrix_flops_per_second / 1e12:.3g} TFLOP/s in matrix products")
    if machine.copy_bytes_per_second is not None:
        parts.append(f"{machine.copy_bytes_per_second / 1e9:.3g} GB/s from pinned memory")
    return ", ".join(parts)


def merged_table(several: Sequence[CheckResults]) -> str:
    """The rows of several checks side by side, as Markdown; cells of rows that a check lacks are empty."""
    heads = [f"{results.teacher}, {results.machine.device}" for results in several]
    lines = [f"- {results.date}, {results.teacher}: {machine_text(results.machine)}" for results in several]
    lines += ["", "| check | " + " | ".join(heads) + " |", "|---" * (1 + len(several)) + "|"]
    for name in row_names(several):
        cells = [_cell(results.row(name)) for results in several]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(row: CheckRow | None) -> str:
    if row is None:
        return ""
    text = row_text(row).replace("|", "/")
    return f"{row.result}: {text}" if text else row.result

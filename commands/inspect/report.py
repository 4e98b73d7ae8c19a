"""`secondcast inspect report`: a report on a cache, and students on it, in one HTML file."""

from pathlib import Path
from typing import Annotated, Any

import typer

from secondcast.commands.shell.console import print_line
from secondcast.commands.shell.outputs import Output, OutputFile, Overwrite, check_outside
from secondcast.commands.shell.resolve import CachePath, Device, Quiet, quiet_device, resolve_teacher, terminal
from secondcast.inspection.report.settings import ReportSettings
from secondcast.storage_schemas.errors import SettingsError
from secondcast.storage_schemas.progress import counted


def inspect_report(
    cache: CachePath,
    out_file: Annotated[Path, typer.Option("--out", metavar="FILE.html", help="HTML file to write.")] = Path(
        "report.html"
    ),
    asked: ReportSettings = ReportSettings(),
    overwrite: Overwrite = False,
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Write an HTML report of a cache: prompts, norms, film strips, student errors by step, and damaged files.

    An earlier report of the same cache is replaced.

    Example: secondcast inspect report my-cache --student my-run --out report.html
    """
    check_outside(out_file, cache)
    if out_file.suffix.lower() not in (".html", ".htm") and not out_file.is_dir():
        raise SettingsError(f"--out is {out_file}, expected a page such as {out_file.stem or 'report'}.html")
    page = OutputFile.open(out_file, overwrite=overwrite, own=lambda found: _is_report_of(found, cache))
    print_line(write_report(cache, page, asked, device=device, quiet=quiet))


def _is_report_of(page: bytes, cache: str) -> bool:
    from secondcast.inspection.report.page import cache_id, cache_id_of

    return cache_id_of(page) == cache_id(cache)


def write_report(
    cache: str, page: Output, asked: ReportSettings, *, device: str, quiet: bool, notes: bool = True
) -> str:
    """Collect, render and atomically write a report; returns a line about its contents.

    notes: whether to print the notes of the page.
    """
    torch_device = quiet_device(device)
    from secondcast.inspection.report.page import render
    from secondcast.inspection.report.report import report_data
    from secondcast.storage_schemas.progress import size_text

    progress = terminal(quiet)
    data = report_data(cache, asked, resolve=resolve_teacher, device=torch_device, progress=progress)
    for note in data["notes"] if notes else ():
        progress.say(note)
    written = render(data).encode()
    page.write(written)
    return f"{page.path}: {size_text(len(written))}, {_contents(data)}"


def _contents(data: dict[str, Any]) -> str:
    table = data["trajectories"]
    read = sum(value is not None for value in table["non_finite"])
    parts = [
        counted(len(table["index"]), "trajectory"),
        f"norms of {read:,}",
        counted(len(data["strips"]["rows"]), "film strip"),
        f"files {data['integrity']['state']}",
    ]
    parts += [f"{row['name']} on {counted(len(row['rows']), 'held-out trajectory')}" for row in data["students"]]
    return ", ".join(parts)

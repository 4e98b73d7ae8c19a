"""`secondcast inspect report`: a cache, and students on it, in one HTML file."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from secondcast.commands.shell.console import print_line
from secondcast.commands.shell.outputs import Output, OutputFile, Overwrite, check_outside
from secondcast.commands.shell.resolve import CachePath, Device, Quiet, quiet_device, resolve_teacher, terminal
from secondcast.storage_schemas.errors import BadSettings
from secondcast.storage_schemas.progress import counted


def inspect_report(
    cache: CachePath,
    students: Annotated[
        list[Path] | None,
        typer.Option("--student", metavar="RUN_OR_EXPORT", help="Evaluate it on held-out trajectories; repeatable."),
    ] = None,
    out_file: Annotated[Path, typer.Option("--out", metavar="FILE.html", help="HTML to write.")] = Path("report.html"),
    evaluations: Annotated[
        list[Path] | None,
        typer.Option(
            "--evaluation", metavar="FILE.json", help="A student as `evaluate score --out` recorded it; repeatable."
        ),
    ] = None,
    strips: Annotated[
        str, typer.Option(metavar="N", help="Film strips, half of the hardest, half at random; 0: none; all.")
    ] = "64",
    frames: Annotated[int | None, typer.Option(min=1, metavar="N", help="Steps of a strip; default: all.")] = None,
    side: Annotated[int, typer.Option(min=16, max=1024, metavar="PX", help="Largest side of a frame.")] = 96,
    evaluate: Annotated[
        int, typer.Option(min=0, metavar="N", help="Held-out trajectories that students are evaluated on; 0: none.")
    ] = 64,
    closed_loop: Annotated[
        int, typer.Option(min=0, metavar="N", help="Of these, sample N with the student leading; 0: none.")
    ] = 16,
    norms: Annotated[int, typer.Option(min=0, metavar="N", help="Read the norms of at most N trajectories.")] = 5000,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Compare every file with its checksum: reads the whole cache.")
    ] = True,
    seed: Annotated[int, typer.Option(min=0, help="Of the strips at random.")] = 0,
    teacher: Annotated[str | None, typer.Option(help="Where vae/ lies here; default: as recorded.")] = None,
    backbone: Annotated[
        str | None, typer.Option(help="Where transformer/ lies; default: --teacher, or as recorded.")
    ] = None,
    backbone_dtype: Annotated[
        Literal["cache", "bfloat16", "float32"], typer.Option(help="cache: as recorded.")
    ] = "cache",
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of each call of the transformer.")] = 8,
    overwrite: Overwrite = False,
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Write one HTML file about a cache: its prompts and norms, film strips, students by step, and what is damaged.

    An earlier report of the same cache is replaced.

    Example: secondcast inspect report my-cache --student my-run --out report.html
    """
    flags = dict(
        students=tuple(students or ()), evaluations=tuple(evaluations or ()), strips=count_of_strips(strips),
        frames=frames, side=side, evaluate=evaluate, closed_loop=closed_loop, norms=norms, verify=verify, seed=seed,
        teacher=teacher, backbone=backbone, backbone_dtype=backbone_dtype, batch_size=batch_size,
    )  # fmt: skip
    check_outside(out_file, cache)
    if out_file.suffix.lower() not in (".html", ".htm") and not out_file.is_dir():
        raise BadSettings(f"--out is {out_file}, expected a page such as {out_file.stem or 'report'}.html")
    page = OutputFile.open(out_file, overwrite=overwrite, own=lambda found: _is_report_of(found, cache))
    print_line(write_report(cache, page, flags, device=device, quiet=quiet))


def _is_report_of(page: bytes, cache: str) -> bool:
    from secondcast.inspection.report.page import cache_id, cache_id_of

    return cache_id_of(page) == cache_id(cache)


def count_of_strips(text: str) -> int | None:
    """A number from 0 on; None for "all". BadSettings for something else."""
    if text == "all":
        return None
    if not (text.isascii() and text.isdigit()):
        raise BadSettings(f"--strips is {text!r}, expected a number of trajectories such as 64, 0 for none, or all")
    return int(text)


def write_report(cache: str, page: Output, flags: dict[str, Any], *, device: str, quiet: bool) -> str:
    """Gather, render and write a report, whole or not at all; a line on what it holds."""
    torch_device = quiet_device(device)
    from secondcast.inspection.report.page import render
    from secondcast.inspection.report.report import ReportSettings, report_data
    from secondcast.storage_schemas.progress import size_text

    progress = terminal(quiet)
    data = report_data(
        cache, ReportSettings.from_flags(**flags), resolve=resolve_teacher, device=torch_device, progress=progress
    )
    for note in data["notes"]:
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
    parts += [f"{one['name']} on {counted(len(one['rows']), 'held-out trajectory')}" for one in data["students"]]
    return ", ".join(parts)

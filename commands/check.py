"""`secondcast check`: prove on this machine that recording, training and sampling are exact, and measure them."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from secondcast.commands.shell.console import print_json, print_line, print_lines
from secondcast.commands.shell.outputs import OutputFolder
from secondcast.commands.shell.resolve import POCKET, Device, Json, Quiet, quiet_device, resolve_teacher, terminal
from secondcast.storage_schemas.errors import SettingsError, SettingsMismatchError
from secondcast.storage_schemas.progress import counted

if TYPE_CHECKING:
    import torch

    from secondcast.check.results import CheckResults, CheckRow
    from secondcast.check.teachers import CheckTeacher

_BROKEN = 1
_FOLDER = Path("check-results")


def check(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[DIR]",
            help="Folder for results, cache and runs. Default: check-results. With --merge: result files.",
        ),
    ] = None,
    teacher: Annotated[
        str,
        typer.Option(
            help="Teacher: pocket; random-flux, random-sd3, random-pixart or random-klein, the size of FLUX.1-dev, "
            "SD3 medium, PixArt-Sigma or FLUX.2-klein 4B with random weights; a folder, or a hub name."
        ),
    ] = POCKET,
    minutes: Annotated[
        float, typer.Option(min=0.1, help="Time of the check; a row that would not end within it is left out.")
    ] = 10.0,
    merge: Annotated[bool, typer.Option("--merge", help="Compare result files, as a Markdown table.")] = False,
    as_json: Json = False,
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Prove on this machine that recording, training and sampling are exact; measure their time and memory.

    Each row is saved when it is made. Run the same command again to resume, or to add rows that were left out. Exit
    code 1 if a row is broken.

    Example: secondcast check --teacher random-flux
    """
    if merge:
        _merge(folders or [])
        return
    if len(folders or ()) > 1:
        raise SettingsError(
            f"{counted(len(folders or ()), 'folder')} are given, expected one: result files need --merge"
        )
    folder = (folders or [_FOLDER])[0]
    results = run_check(folder, teacher, minutes=minutes, device=device, quiet=quiet or as_json)
    if as_json:
        print_json(results.json_value())
    broken = results.broken
    if not as_json:
        kinds = [row.result for row in results.rows]
        print_line(
            f"{folder}: {kinds.count('holds')} hold, {len(broken)} broken, {kinds.count('measured')} measured, "
            f"{kinds.count('not run')} not run" + (f"; broken: {', '.join(broken)}" if broken else "")
        )
    if broken:
        raise typer.Exit(_BROKEN)


def run_check(folder: Path, teacher: str, *, minutes: float, device: str, quiet: bool) -> "CheckResults":
    """Make the rows that are missing in a folder; see check."""
    from secondcast.check.results import RESULTS_FILE, CheckResults, read_results

    output = OutputFolder.open(folder, "check", (RESULTS_FILE,), settings={"teacher": teacher}, alone=True)
    torch_device = quiet_device(device)
    from secondcast.models.device import fix_cublas_workspace

    # Before the matrix rate is measured.
    fix_cublas_workspace()
    from secondcast.check.check import Check, empty_results

    chosen = _teacher(teacher, torch_device)
    results = empty_results(chosen)
    if (folder / RESULTS_FILE).is_file():
        earlier = read_results(folder / RESULTS_FILE)
        if earlier.version != results.version:
            raise SettingsMismatchError(
                f"{folder} has the check of version {earlier.version}, this is {results.version}: give another folder"
            )
        if difference := results.machine.differs_from(earlier.machine):
            raise SettingsMismatchError(
                f"{folder} has the check of another machine or environment ({difference}): give another folder"
            )
        results = earlier
        kept = [row for row in results.rows if row.result != "not run"]
        if not quiet:
            print_line(f"{folder}: {counted(len(kept), 'row')} kept from an earlier call")

    def keep(results: CheckResults, row: "CheckRow") -> None:
        output.write(RESULTS_FILE, results.encoded())
        if not quiet:
            _print_row(row)

    return Check(chosen, folder, results, keep).run(minutes=minutes, progress=terminal(quiet))


def _teacher(name: str, device: "torch.device") -> "CheckTeacher":
    from dataclasses import replace

    from secondcast.check import teachers
    from secondcast.models.teacher.folder import BUILD_PARTS, POOLED_PARTS
    from secondcast.models.teacher.planned import planned_teacher

    if name in teachers.RANDOM:
        folder = replace(planned_teacher(teachers.RANDOM[name])[0], source=name)
        return teachers.RandomTeacher(folder, teachers.FULL, device)
    scale = teachers.POCKET if name == POCKET else teachers.FULL
    return teachers.TeacherOnDisk(resolve_teacher(name, (*BUILD_PARTS, *POOLED_PARTS)), scale, device)


def _print_row(row: "CheckRow") -> None:
    from secondcast.check.table import row_text

    print_line(f"{row.result:<9} {row.name:<43} {row_text(row)}")


def _merge(files: list[Path]) -> None:
    from secondcast.check.results import RESULTS_FILE, read_results
    from secondcast.check.table import merged_table

    if not files:
        raise SettingsError(f"--merge without files, expected one or more {RESULTS_FILE} of earlier checks")
    print_lines(merged_table([read_results(file) for file in files]).splitlines())

"""`secondcast build`: phase 1."""

from typing import TYPE_CHECKING, Annotated

import typer

from secondcast.cache_builder.settings import BuildSettings
from secondcast.cache_builder.workers.launcher import BuildLauncher
from secondcast.commands.shell.config_file import Config
from secondcast.commands.shell.console import print_line
from secondcast.commands.shell.resolve import CachePath, Device, Quiet, Revision, TeacherName, resolve_teacher, terminal
from secondcast.storage_schemas.errors import SettingsError
from secondcast.storage_schemas.progress import counted, size_text

if TYPE_CHECKING:
    from secondcast.cache_builder.build import BuildResult


def build(
    cache: CachePath,
    teacher: TeacherName,
    asked: BuildSettings,
    launcher: BuildLauncher,
    revision: Revision = None,
    pilot: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Build only the first shards with this many trajectories, check them and estimate the whole build.",
        ),
    ] = None,
    device: Device = "auto",
    quiet: Quiet = False,
    config: Config = None,
) -> None:
    """Record the teacher's trajectory for every prompt. Run the same command again to resume.

    Example: secondcast build my-cache --teacher pocket --prompts prompts.txt
    """
    torch_device = launcher.own_device(device)
    from secondcast.models.teacher.folder import build_parts

    found = resolve_teacher(teacher, build_parts(asked.pooled), revision)
    if pilot is not None:
        if asked.text_only:
            raise SettingsError(
                "--pilot and --text-only cannot be combined: a pilot checks and times trajectories; remove one of them"
            )
        launcher.check_alone("--pilot")
        from secondcast.cache_builder.checks.pilot import run_pilot
        from secondcast.commands.build.pilot import print_pilot

        print_pilot(run_pilot(cache, asked, found, torch_device, terminal(quiet), count=pilot))
        return
    _report(launcher.build(cache, asked, found, torch_device, terminal(quiet), device))


def _report(result: "BuildResult") -> None:
    trajectories, prompts = counted(result.planned, "trajectory"), counted(result.prompts, "prompt")
    if not result.finished:
        trajectories = f"{result.trajectories} of {trajectories}"
    held = f"{trajectories} of {prompts}" if result.planned else prompts
    print_line(f"{result.location}: {held}, {size_text(result.bytes)}")
    if not result.finished:
        embeddings = f"{result.embeddings} of {result.planned_embeddings} embeddings are built"
        print_line(f"{embeddings}; the build is complete when every worker has built its shards")

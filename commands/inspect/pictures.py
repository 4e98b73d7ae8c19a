"""The commands that draw pictures of a cache: film strips, and students beside the teacher."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from secondcast.commands.shell.console import print_json, print_line, print_lines, terminal_width
from secondcast.commands.shell.outputs import (
    PICTURES,
    Output,
    OutputFile,
    Overwrite,
    check_folder,
    check_outside,
    check_picture,
    is_named_as_a_file,
    picture_bytes,
)
from secondcast.commands.shell.resolve import (
    BackboneName,
    CachePath,
    Device,
    Json,
    Quiet,
    Verify,
    quiet_device,
    resolve_teacher,
    terminal,
)
from secondcast.evaluation.settings.cache_scoring import BackboneCalls, CacheScoring, ShownSteps, VaeFolder
from secondcast.storage_schemas.errors import SettingsError
from secondcast.storage_schemas.progress import counted

if TYPE_CHECKING:
    from secondcast.storage_schemas.reader import Cache

_FRAMES = 8
SHEET_FILE = "sheet.png"


def inspect_images(
    cache: CachePath,
    keys: Annotated[
        list[str] | None, typer.Argument(metavar="KEY", help="Trajectories. Default: the first four.")
    ] = None,
    out_path: Annotated[
        Path, typer.Option("--out", help="PNG with all strips, or a folder for that and a PNG per trajectory.")
    ] = Path("film-strips.png"),
    num_frames: Annotated[
        int | None, typer.Option(min=1, help=f"Number of evenly spaced steps per strip. Default: {_FRAMES}.")
    ] = None,
    chosen: ShownSteps = ShownSteps(),
    frame_size: Annotated[int, typer.Option(min=16, help="Side of each frame in pixels.")] = 96,
    vae: VaeFolder = VaeFolder(),
    verify_checksums: Verify = "once",
    overwrite: Overwrite = False,
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Draw film strips of trajectories: latents and predicted clean images, decoded by the teacher's VAE.

    Example: secondcast inspect images my-cache 0 7 --out strips.png

    Example: secondcast inspect images my-cache 0 7 --timesteps 0,1,2,19 --out strips
    """
    from secondcast.storage_schemas.reader import Cache

    steps = chosen.timesteps
    if steps is not None and num_frames is not None:
        raise SettingsError("--num-frames and --timesteps both select the steps of a strip: give one of them")
    opened = Cache.open(cache, verify=verify_checksums)
    opened.require_trajectories("inspect images")
    CacheScoring.from_flags(timesteps=steps).steps_on(opened)
    check_outside(out_path, cache)
    if not _is_picture(out_path):
        _check_strips_folder(out_path)
    indices = [opened.key_index(key) for key in keys] if keys else [int(i) for i in opened.indices()[:4]]
    if not indices:
        raise SettingsError(f"{opened.folder} has no committed trajectory yet: run the build command again")
    folder = None if _is_picture(out_path) else out_path
    each_file = {} if folder is None else {i: _strip_file(opened, i, folder, overwrite) for i in indices}
    sheet = OutputFile.open(out_path if folder is None else folder / SHEET_FILE, overwrite=overwrite)
    _write_strips(
        opened, indices, steps, num_frames or _FRAMES, frame_size, vae.teacher, device, each=each_file, sheet=sheet,
        quiet=quiet,
    )  # fmt: skip
    each = "" if folder is None else f", one file each and all in {SHEET_FILE}"
    print_line(f"{counted(len(indices), 'film strip')} in {out_path}{each}")


def _strip_file(cache: "Cache", index: int, folder: Path, overwrite: bool) -> OutputFile:
    from secondcast.storage_schemas.record import trajectory_key

    place = cache.layout.place(index)
    key = trajectory_key(cache.prompts[place.prompt].id, place.sample_index)
    return OutputFile.open(folder / f"{key}.png", overwrite=overwrite)


def write_film_strips(
    cache: "Cache", indices: list[int], num_frames: int, teacher: str | None, device: str, sheet: Output, *, quiet: bool
) -> None:
    """Write film strips of trajectories to a PNG."""
    from secondcast.inspection.images import SIDE

    _write_strips(cache, indices, None, num_frames, SIDE, teacher, device, each={}, sheet=sheet, quiet=quiet)


def _write_strips(
    cache: "Cache",
    indices: list[int],
    steps: Sequence[int] | None,
    num_frames: int,
    side: int,
    teacher: str | None,
    device: str,
    *,
    each: Mapping[int, Output],
    sheet: Output,
    quiet: bool,
) -> None:
    """each: files of single strips by trajectory; sheet: file with all strips."""
    torch_device = quiet_device(device)
    from secondcast.inspection.images import each_film_strip, shown_steps
    from secondcast.inspection.sheet import stacked
    from secondcast.models.teacher.folder import DECODE_PARTS

    found = resolve_teacher(teacher or cache.manifest.source, DECODE_PARTS)
    if steps is None:
        steps = shown_steps(cache.manifest.sampling.steps, num_frames)
    strips = []
    with terminal(quiet).bar("film strips", total=len(indices), done=0, unit="trajectories") as bar:
        for trajectory, strip in each_film_strip(cache, found, indices, steps, device=torch_device, side=side):
            if trajectory.index in each:
                file = each[trajectory.index]
                file.write(picture_bytes(strip, file.path))
            strips.append(strip)
            bar.advance(1)
    sheet.write(picture_bytes(stacked(strips), sheet.path))


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in PICTURES and not path.is_dir()


def _check_strips_folder(path: Path) -> None:
    if is_named_as_a_file(path):
        raise SettingsError(f"--out is {path}, expected a picture ({', '.join(PICTURES)}) or a folder")
    check_folder(path)


def inspect_compare(
    cache: CachePath,
    keys: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY", help="Trajectories. Default: eight held-out ones, evenly spread."),
    ] = None,
    student: Annotated[list[Path], typer.Option(metavar="RUN", help="Run folder or export; may be repeated.")] = [],  # noqa: B006
    out_file: Annotated[Path, typer.Option("--out", help="PNG file to write.")] = Path("compare.png"),
    backbone: BackboneName = None,
    calls: BackboneCalls = BackboneCalls(),
    verify_checksums: Verify = "once",
    overwrite: Overwrite = False,
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Draw teacher and students side by side from the same cached noise, with differences and errors by step.

    Example: secondcast inspect compare my-cache --student my-run --student other-run --out compare.png
    """
    from secondcast.storage_schemas.reader import Cache

    if not student:
        raise SettingsError("inspect compare needs --student RUN, a run folder or an export, once for each student")
    check_picture(out_file, "--out")
    check_outside(out_file, cache)
    sheet = OutputFile.open(out_file, overwrite=overwrite)
    opened = Cache.open(cache, verify=verify_checksums)
    opened.require_trajectories("inspect compare")
    torch_device = quiet_device(device)
    from secondcast.inspection.compare import chosen_trajectories, compare_students, compared_facts, names_of
    from secondcast.inspection.compare_sheet import comparison_sheet
    from secondcast.inspection.compare_text import compare_lines
    from secondcast.models.teacher.folder import DECODE_PARTS, REPLAY_PARTS

    settings = CacheScoring(**calls.given)
    names, chosen = names_of(student), chosen_trajectories(opened, keys or [])
    teacher = resolve_teacher(backbone or opened.manifest.source, (*REPLAY_PARTS, *DECODE_PARTS))
    compared = compare_students(
        opened, names, chosen, teacher, settings, device=torch_device, progress=terminal(quiet)
    )  # fmt: skip
    facts = compared_facts(compared)
    sheet.write(picture_bytes(comparison_sheet(compared, facts), out_file))
    if as_json:
        print_json(facts | {"picture": str(out_file)})
        return
    print_lines([*compare_lines(facts, width=terminal_width()), "", f"side by side in {out_file}"])

"""`secondcast evaluate table --cache`: distances of students from the teacher on a cache."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from secondcast.commands.evaluate.cache import open_bench
from secondcast.commands.evaluate.reuse import Reused
from secondcast.commands.shell.outputs import OutputFolder
from secondcast.commands.shell.resolve import quiet_device, terminal
from secondcast.storage_schemas.errors import SettingsError

if TYPE_CHECKING:
    from secondcast.evaluation.results import Evaluation
    from secondcast.evaluation.settings.cache_scoring import CacheScoring
    from secondcast.evaluation.tables.error_table import ErrorTable
    from secondcast.storage_schemas.reader import Cache

ERROR_FILES = ("errors.md", "errors.json", "errors.png")
_KEPT = "evaluated"


def cache_table(
    groups: Mapping[str, Sequence[Path]],
    cache: "Cache",
    settings: "CacheScoring",
    *,
    backbone: str | None,
    folder: Path | None,
    device: str,
    quiet: bool,
) -> "ErrorTable":
    """Evaluate all runs with one evaluator; evaluations that exist in the folder are reused."""
    from secondcast.evaluation.tables.error_table import error_table

    files = _files(groups, cache, settings, backbone, folder, device)
    found, reused = {}, Reused()
    for place, file in files.items():
        if (before := None if folder is None else kept_evaluation(file)) is not None:
            found[place] = before
        reused.note(str(place), reused=before is not None)
    reused.say(terminal(quiet), None if folder is None else folder / _KEPT)
    missing = [place for place in files if place not in found]
    if missing:
        evaluator = open_bench(cache, settings, backbone, device, quiet)
        if len(missing) > 1:
            # Load every student first: one that does not fit fails before hours of the others.
            for place in missing:
                evaluator.student(place)
        for place in missing:
            # Runs of one student under several names share an evaluation.
            same = next((found[other] for other in found if files[other] == files[place]), None)
            found[place] = same or evaluator.evaluate(place)
            if folder is not None and same is None:
                files[place].parent.mkdir(parents=True, exist_ok=True)
                found[place].write(files[place])
    return error_table([(name, [found[place] for place in places]) for name, places in groups.items()])


def _files(
    groups: Mapping[str, Sequence[Path]],
    cache: "Cache",
    settings: "CacheScoring",
    backbone: str | None,
    folder: Path | None,
    device: str,
) -> dict[Path, Path]:
    """The file of each run's evaluation, named by a digest of everything the evaluation depends on."""
    quiet_device(device)
    from secondcast.evaluation.tables.scored_rows import computed_by
    from secondcast.evaluation.text_encoder import student_digest
    from secondcast.models.student.folder import student_folder
    from secondcast.storage_schemas.io.digests import digest

    inputs = {
        "count": settings.num_trajectories,
        "closed_loop": settings.closed_loop,
        "committed": len(cache),
        # The digest of the prompts covers teacher and sampling.
        "cache": cache.manifest.digests()["prompts"],
        "backbone": backbone or cache.manifest.source,
        **computed_by(device),
    }
    kept_in = (folder or Path()) / _KEPT
    files = {}
    for place in [place for places in groups.values() for place in places]:
        own = inputs | {"student": student_digest(student_folder(place))}
        files[place] = kept_in / f"{digest(own)[:24]}.json"
    return files


def kept_evaluation(file: Path) -> "Evaluation | None":
    """An earlier evaluation; None if there is none, or if its file is damaged or of another version."""
    from secondcast.evaluation.results import Evaluation

    try:
        return Evaluation.read(file)
    except SettingsError:
        return None


def write_error_results(table: "ErrorTable", folder: OutputFolder) -> None:
    """Write ERROR_FILES."""
    from secondcast.evaluation.tables.error_table import curves, error_markdown
    from secondcast.evaluation.tables.plots import plot_step_errors

    folder.write("errors.md", error_markdown(table).encode())
    folder.write("errors.json", (table.model_dump_json(indent=1) + "\n").encode())
    folder.write("errors.png", plot_step_errors(curves(table), sigmas=table.sigmas))

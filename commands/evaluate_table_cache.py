"""`understudy evaluate table --cache`: students by their distances from the teacher on a cache."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from commands.evaluate_cache import score_on_cache
from storage_schemas.errors import BadSettings

if TYPE_CHECKING:
    from evaluation.error_table import ErrorTable
    from evaluation.results import Evaluation


def cache_table(
    groups: Mapping[str, Sequence[Path]],
    location: str,
    *,
    count: int,
    closed_loop: int,
    backbone: str | None,
    folder: Path | None,
    device: str,
    quiet: bool,
) -> "ErrorTable":
    """Evaluate all runs on the same trajectories; those that a folder has evaluations of are not evaluated again."""
    flags = {"count": count, "closed_loop": closed_loop}
    rows = [
        (
            name,
            [_evaluated(place, location, flags, folder, backbone, device, quiet) for place in places],
        )
        for name, places in groups.items()
    ]
    from evaluation.error_table import error_table

    return error_table(rows)


def _evaluated(
    run: Path,
    location: str,
    flags: dict[str, Any],
    folder: Path | None,
    backbone: str | None,
    device: str,
    quiet: bool,
) -> "Evaluation":
    if folder is None:
        return score_on_cache(
            run, location, flags, backbone=backbone, verify="once", out_file=None, device=device, quiet=quiet
        )
    from evaluation.leader import weights_digest
    from evaluation.scored_rows import computed_by
    from models.student import student_folder
    from storage_schemas.digests import digest
    from storage_schemas.reader import Cache

    cache = Cache.open(location)
    asked = {"student": weights_digest(student_folder(run)), "committed": len(cache), **flags, **computed_by(device)}
    # The digest of the prompts covers teacher and sampling.
    asked |= {"cache": cache.manifest.digests()["prompts"], "backbone": backbone or cache.manifest.source}
    file = folder / "evaluated" / f"{digest(asked)[:24]}.json"
    if (found := kept_evaluation(file)) is not None:
        return found
    file.parent.mkdir(parents=True, exist_ok=True)
    return score_on_cache(
        run, location, flags, backbone=backbone, verify="once", out_file=file, device=device, quiet=quiet
    )


def kept_evaluation(file: Path) -> "Evaluation | None":
    """What was evaluated before; None where nothing is, or a file that is damaged or of another version."""
    from evaluation.results import Evaluation

    try:
        return Evaluation.read(file)
    except BadSettings:
        return None


def write_error_results(table: "ErrorTable", folder: Path) -> None:
    """errors.md, errors.json, errors.png."""
    from evaluation.error_table import curves, error_markdown
    from evaluation.plots import plot_step_errors
    from storage_schemas import durable

    folder.mkdir(parents=True, exist_ok=True)
    durable.replace(folder / "errors.md", error_markdown(table).encode())
    durable.replace(folder / "errors.json", (table.model_dump_json(indent=1) + "\n").encode())
    plot_step_errors(curves(table), folder / "errors.png", sigmas=table.sigmas)

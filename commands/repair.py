"""The commands that verify and repair a cache."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from secondcast.commands.shell.console import print_json, print_line, print_lines, terminal_width
from secondcast.commands.shell.resolve import CachePath, Device, Json, Quiet, quiet_device, resolve_teacher, terminal
from secondcast.inspection.repairing import need_of, problem_lines, repair_value, way_out
from secondcast.storage_schemas.errors import DamagedCacheError
from secondcast.storage_schemas.progress import counted

if TYPE_CHECKING:
    from secondcast.cache_builder.repair.resample import Recomputed
    from secondcast.storage_schemas.maintenance.verify import Report

DAMAGED = 1


def inspect_verify(
    cache: CachePath,
    resample: Annotated[
        int | None, typer.Option(min=1, help="Recompute N random trajectories with the teacher and compare.")
    ] = None,
    teacher: Annotated[str | None, typer.Option(help="Teacher for --resample. Default: the recorded one.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed for the choice of --resample.")] = 0,
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare every file of a cache with its checksum; exit with code 1 if one differs.

    --resample also recomputes some trajectories: exit code 1 if their bits differ on the same device, with the same
    versions, batch size and threads as the recording.

    Example: secondcast inspect verify my-cache --resample 4
    """
    from secondcast.storage_schemas.maintenance.verify import verify
    from secondcast.storage_schemas.progress import size_text

    report = verify(cache, terminal(quiet))
    # Recomputation adds nothing where files are already known to be damaged.
    made = _recompute(cache, teacher, resample, seed, device, quiet) if resample and not report.problems else None
    source = _recorded_source(cache) if report.problems else None
    if as_json:
        problems = [
            {"path": p.path, "shard": p.shard, "problem": p.message, "needs": need_of(p, report)}
            for p in report.problems
        ]
        found: dict[str, Any] = {"shards": report.shards, "bytes": report.bytes, "problems": problems}
        found["repair"] = repair_value(cache, report, source) if report.problems else None
        print_json(found | ({} if made is None else {"recomputed": [m.json_value() for m in made]}))
    else:
        not_built = f"{counted(report.missing, 'shard')} not built yet, " if report.missing else ""
        lines = [
            f"{cache}: {counted(report.shards, 'shard')}, {size_text(report.bytes)}, "
            f"{not_built}{counted(len(report.problems), 'problem')}"
        ]
        if report.problems:
            lines += problem_lines(cache, report, source, width=terminal_width())
        print_lines([*lines, *([] if made is None else _recomputed_lines(made))])
    if report.problems or any(m.is_fault for m in made or ()):
        raise typer.Exit(DAMAGED)


def _recorded_source(cache: str) -> str | None:
    from secondcast.storage_schemas.io.folders import open_folder
    from secondcast.storage_schemas.reader import read_manifest

    return read_manifest(open_folder(cache)).source


def _recompute(cache: str, teacher: str | None, count: int, seed: int, device: str, quiet: bool) -> "list[Recomputed]":
    torch_device = quiet_device(device)
    from secondcast.cache_builder.repair.resample import recompute
    from secondcast.models.teacher.folder import build_parts
    from secondcast.storage_schemas.io.folders import open_folder
    from secondcast.storage_schemas.reader import read_manifest

    manifest = read_manifest(open_folder(cache))
    folder = resolve_teacher(teacher or manifest.source, build_parts(manifest.teacher.pooled))
    return recompute(cache, folder, torch_device, terminal(quiet), count=count, seed=seed)


def _recomputed_lines(made: "list[Recomputed]") -> list[str]:
    lines = []
    for m in made:
        if m.bit_equal:
            lines.append(f"{m.key}: recomputed bit for bit")
            continue
        steps = " ".join(f"{error:.1e}" for error in m.velocity_errors)
        text = "".join(f"; {error}" for error in _text_errors([m]))
        why = f"recorded with other {', '.join(m.differs)}" if m.differs else "recorded under the same conditions"
        lines.append(f"{m.key}: bits differ ({why}); relative error of the velocity by step {steps}{text}")
    worst = max(max(m.velocity_errors) for m in made)
    text = "".join(f", {error}" for error in _text_errors(made))
    equal = sum(m.bit_equal for m in made)
    return [*lines, f"{equal} of {len(made)} recomputed bit for bit; largest error of the velocity {worst:.1e}{text}"]


def _text_errors(made: "list[Recomputed]") -> list[str]:
    """The largest errors of the text tensors that the cache holds."""
    errors = {
        "embedding": [m.embedding_error for m in made if m.embedding_error is not None],
        "pooled vector": [m.pooled_error for m in made if m.pooled_error is not None],
    }
    return [f"of the {name} {max(values):.1e}" for name, values in errors.items() if values]


def repair(
    cache: CachePath,
    copy: Annotated[
        str | None, typer.Option("--from", help="Copy intact files from this other copy of the cache.")
    ] = None,
    teacher: Annotated[str | None, typer.Option(help="Rebuild the remaining shards with this teacher.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Batch size for --teacher. Default: as recorded with each shard.")
    ] = None,
    allow_mismatch: Annotated[
        bool, typer.Option("--allow-mismatch", help="Accept rebuilt shards that differ in their last bits.")
    ] = False,
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Repair a damaged cache: from its own files, from another copy, then with the teacher, in whole shards.

    Example: secondcast repair my-cache --from /backup/my-cache
    """
    from secondcast.storage_schemas.maintenance.repair import repair_cache

    progress = terminal(quiet)
    done = repair_cache(cache, copy, progress)
    for path in done.files:
        print_line(f"{path}: repaired")
    for kind, shard in done.shards:
        print_line(f"{kind} shard {shard}: taken from {copy}")
    left, missing = done.left, done.missing
    if teacher is not None and any(problem.shard for problem in left):
        report = _rebuild(cache, teacher, batch_size, allow_mismatch, device, quiet)
        left, missing = report.problems, report.missing
    if left:
        raise DamagedCacheError(
            f"{cache} has {counted(len(left), 'problem')} left, the first: {left[0].message}{way_out(left[0])}"
        )
    built = f"; {counted(missing, 'shard')} not built yet: run the build command to build the rest" if missing else ""
    print_line(f"{cache}: every file matches its checksum{built}")


def _rebuild(cache: str, teacher: str, batch_size: int | None, accept: bool, device: str, quiet: bool) -> "Report":
    torch_device = quiet_device(device)
    from secondcast.cache_builder.repair.rebuild import rebuild
    from secondcast.models.teacher.folder import build_parts
    from secondcast.storage_schemas.io.folders import open_folder
    from secondcast.storage_schemas.maintenance.verify import verify
    from secondcast.storage_schemas.progress import Silent
    from secondcast.storage_schemas.reader import read_manifest

    folder = resolve_teacher(teacher, build_parts(read_manifest(open_folder(cache)).teacher.pooled))
    rebuilt = rebuild(
        cache, folder, torch_device, terminal(quiet), batch_size=batch_size, allow_mismatch=accept
    )  # fmt: skip
    for kind, shard in rebuilt:
        print_line(f"{kind} shard {shard}: rebuilt")
    return verify(cache, Silent())

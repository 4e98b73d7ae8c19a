"""The commands that check a cache and put it right."""

import json
from typing import TYPE_CHECKING, Annotated

import typer

from commands.resolve import CachePath, Device, Json, Quiet, out, quiet_device, resolve_teacher, terminal
from storage_schemas.errors import DamagedCache

if TYPE_CHECKING:
    from storage_schemas.verification import Problem, Report

DAMAGED = 1


def inspect_verify(cache: CachePath, as_json: Json = False, quiet: Quiet = False) -> None:
    """Compare every file of a cache with its checksum; exit code 1 if one differs.

    Example: understudy inspect verify my-cache
    """
    from storage_schemas.progress import size_text
    from storage_schemas.verification import verify

    report = verify(cache, terminal(quiet))
    if as_json:
        problems = [{"path": p.path, "shard": p.shard, "problem": p.message} for p in report.problems]
        print(json.dumps({"shards": report.shards, "bytes": report.bytes, "problems": problems}, indent=1))
    else:
        for problem in report.problems:
            out.print(problem.message, markup=False)
        what = f"{report.missing} shards not built yet, " if report.missing else ""
        out.print(
            f"{cache}: {report.shards} shards, {size_text(report.bytes)}, {what}{len(report.problems)} problems",
            markup=False,
        )
    if report.problems:
        raise typer.Exit(DAMAGED)


def repair(
    cache: CachePath,
    copy: Annotated[str | None, typer.Option("--from", help="Another copy of this cache.")] = None,
    teacher: Annotated[str | None, typer.Option(help="Rebuild what is left with the teacher of the recording.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Default: as recorded with each shard.")] = None,
    accept_other_bytes: Annotated[
        bool, typer.Option("--accept-other-bytes", help="Record rebuilt shards that differ in their last bits.")
    ] = False,
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Put a damaged cache right: from itself, from another copy, then with the teacher. Whole shards, or none.

    Example: understudy repair my-cache --from /backup/my-cache
    """
    from storage_schemas.repair import mend

    progress = terminal(quiet)
    done = mend(cache, copy, progress)
    for path in done.files:
        out.print(f"{path}: put right", markup=False)
    for kind, shard in done.shards:
        out.print(f"{kind} shard {shard}: taken from {copy}", markup=False)
    left, missing = done.left, done.missing
    if teacher is not None and any(problem.shard for problem in left):
        report = _rebuild(cache, teacher, batch_size, accept_other_bytes, device, quiet)
        left, missing = report.problems, report.missing
    if left:
        raise DamagedCache(f"{cache} has {len(left)} problems left, the first: {left[0].message}{_way_out(left[0])}")
    built = f"; {missing} shards are not built: the build command makes them" if missing else ""
    out.print(f"{cache}: every file is what it should be{built}", markup=False)


def _way_out(problem: "Problem") -> str:
    """What helps, where the problem's own message does not say it."""
    if "`understudy repair" in problem.message or "delete it" in problem.message or "build command" in problem.message:
        return ""
    if problem.shard is not None:
        return "; try --teacher TEACHER or --from COPY"
    return "; try --from COPY, or give the build command again: it writes such files anew"


def _rebuild(cache: str, teacher: str, batch_size: int | None, accept: bool, device: str, quiet: bool) -> "Report":
    torch_device = quiet_device(device)
    from cache_builder.rebuild import rebuild
    from models.teacher_folder import build_parts
    from storage_schemas.folders import open_folder
    from storage_schemas.progress import Silent
    from storage_schemas.reader import read_manifest
    from storage_schemas.verification import verify

    folder = resolve_teacher(teacher, build_parts(read_manifest(open_folder(cache)).teacher.pooled))
    rebuilt = rebuild(
        cache, folder, torch_device, terminal(quiet), batch_size=batch_size, accept_other_bytes=accept
    )  # fmt: skip
    for kind, shard in rebuilt:
        out.print(f"{kind} shard {shard}: rebuilt", markup=False)
    return verify(cache, Silent())

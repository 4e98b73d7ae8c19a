"""Commands that repair each problem of a cache, ready to copy."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from secondcast.inspection.text_layout import table_lines, wrapped
from secondcast.storage_schemas.io.folders import is_remote
from secondcast.storage_schemas.schema.commits import COMMITS_FOLDER

if TYPE_CHECKING:
    from secondcast.storage_schemas.maintenance.verify import Problem, Report

Need = Literal["delete", "itself", "shard", "copy"]
"""Delete by hand; repair from the rest of the cache; from a copy or the teacher; from a copy or the build command."""

# A repair of the first kind includes the others.
_HARDEST_FIRST: tuple[Need, ...] = ("copy", "shard", "itself")
_OF_A_COPY = ("prompts.jsonl", "tokenizer/")
_DELETE = {"s3": "aws s3 rm", "gs": "gsutil rm"}


def need_of(problem: "Problem", report: "Report") -> Need:
    """What the repair of a problem needs."""
    if problem.shard is None:
        if problem.foreign:
            return "delete"
        return "copy" if problem.path.startswith(_OF_A_COPY) else "itself"
    # Only the index of a finished build duplicates records, and only records that it has and that are planned.
    repeated = report.missing == 0 and problem.repeated
    return "itself" if problem.path.startswith(f"{COMMITS_FOLDER}/") and repeated else "shard"


def way_out(problem: "Problem") -> str:
    """A hint that completes a problem's message, if the message itself has none."""
    said = ("`secondcast repair", "delete it", "build command")
    if any(way in problem.message for way in said):
        return ""
    if problem.shard is not None:
        return "; try --teacher TEACHER or --from COPY"
    return "; try --from COPY, or rerun the build command: it rewrites such files"


def repair_commands(cache: str, report: "Report", teacher: str | None) -> list[str]:
    """Commands that repair all problems, in order; the user fills in COPY and TEACHER.

    teacher: the recorded teacher, if known.
    """
    needs = {need_of(problem, report) for problem in report.problems}
    deleted = [_deletion(cache, p.path) for p in report.problems if need_of(p, report) == "delete"]
    hardest = next((need for need in _HARDEST_FIRST if need in needs), None)
    return [*deleted, *([] if hardest is None else [_repair(cache, hardest, teacher)])]


def repair_command(cache: str, problem: "Problem", report: "Report", teacher: str | None) -> str:
    """The command that repairs a single problem of a report."""
    need = need_of(problem, report)
    return _deletion(cache, problem.path) if need == "delete" else _repair(cache, need, teacher)


def _repair(cache: str, need: Need, teacher: str | None) -> str:
    named = shlex.quote(teacher) if teacher else "TEACHER"
    return f"secondcast repair {shlex.quote(cache)}" + {"copy": " --from COPY", "shard": f" --teacher {named}"}.get(
        need, ""
    )


def _deletion(cache: str, path: str) -> str:
    command = _DELETE.get(cache.split("://")[0], "delete") if is_remote(cache) else "rm"
    return f"{command} {shlex.quote(f'{_location(cache)}/{path}')}"


def _location(cache: str) -> str:
    """The location as in the messages of problems."""
    return cache.rstrip("/") if is_remote(cache) else str(Path(cache))


def other_way(report: "Report") -> str | None:
    """The alternative to the last command; None if there is none."""
    needs = {need_of(problem, report) for problem in report.problems}
    if "copy" in needs:
        return "without a copy: rerun the build command, which rewrites prompts and tokenizer"
    return "with another copy of the cache: --from COPY instead of --teacher" if "shard" in needs else None


def problem_lines(cache: str, report: "Report", teacher: str | None, *, width: int | None) -> list[str]:
    """A table of the problems, and the commands that repair them. width: see entry_lines."""
    rows = [[_shard(problem), problem.path, short_message(cache, problem)] for problem in report.problems]
    head = ["shard", "file", "problem"]
    if width is None:
        lines = table_lines(head, rows, text_columns=(0, 1, 2))
    else:
        # Checksums are longer than a line: print the problem below its file.
        shards = max(len(row[0]) for row in (head, *rows))
        margin = " " * (shards + 2)
        lines = [f"{head[0]:<{shards}}  file, and below it the problem"]
        for shard, path, text in rows:
            lines += [f"{shard:<{shards}}  {path}"]
            lines += [f"{margin}  {line}" for line in wrapped(text, width=width - len(margin) - 2)]
    commands = repair_commands(cache, report, teacher)
    other = other_way(report)
    return [
        *lines,
        "to repair:",
        *(f"  {command}" for command in commands),
        *([] if other is None else [f"  ({other})"]),
    ]


def repair_value(cache: str, report: "Report", teacher: str | None) -> dict[str, Any]:
    """The same as plain JSON types."""
    return {"commands": repair_commands(cache, report, teacher), "otherwise": other_way(report)}


def short_message(cache: str, problem: "Problem") -> str:
    """A problem without the file's path, and without the fixes, which are printed below the table."""
    text = problem.message
    for where in (f"{_location(cache)}/{problem.path} ", f"{_location(cache)} "):
        text = text.removeprefix(where)
    return text if problem.foreign else text.split(": ")[0]


def _shard(problem: "Problem") -> str:
    return "-" if problem.shard is None else f"{problem.shard[0]} {problem.shard[1]}"

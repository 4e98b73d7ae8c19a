"""What puts each problem of a cache right: commands to copy."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from secondcast.inspection.text_layout import table_lines, wrapped
from secondcast.storage_schemas.io.folders import is_remote
from secondcast.storage_schemas.schema.commits import COMMITS_FOLDER

if TYPE_CHECKING:
    from secondcast.storage_schemas.maintenance.verify import Problem, Report

Need = Literal["delete", "itself", "shard", "copy"]
"""Deleted by hand; from the rest of the cache; from a copy or the teacher; from a copy or the build command."""

# A repair that does the first also does what the others need.
_HARDEST_FIRST: tuple[Need, ...] = ("copy", "shard", "itself")
_OF_A_COPY = ("prompts.jsonl", "tokenizer/")
_DELETE = {"s3": "aws s3 rm", "gs": "gsutil rm"}


def need_of(problem: "Problem", report: "Report") -> Need:
    """What a problem takes to be put right."""
    if problem.shard is None:
        if problem.foreign:
            return "delete"
        return "copy" if problem.path.startswith(_OF_A_COPY) else "itself"
    # Only the index of a finished build repeats records, and not those that it lacks or that say what is not planned.
    repeated = report.missing == 0 and problem.repeated
    return "itself" if problem.path.startswith(f"{COMMITS_FOLDER}/") and repeated else "shard"


def way_out(problem: "Problem") -> str:
    """What helps, as the end of a sentence, where the problem's own message does not say it."""
    said = ("`secondcast repair", "delete it", "build command")
    if any(way in problem.message for way in said):
        return ""
    if problem.shard is not None:
        return "; try --teacher TEACHER or --from COPY"
    return "; try --from COPY, or give the build command again: it writes such files anew"


def mending_commands(cache: str, report: "Report", teacher: str | None) -> list[str]:
    """Commands that put all problems right, in order; COPY and TEACHER are to be filled in by the user.

    teacher: the one that was recorded, where it is known.
    """
    needs = {need_of(problem, report) for problem in report.problems}
    deleted = [_deletion(cache, p.path) for p in report.problems if need_of(p, report) == "delete"]
    hardest = next((need for need in _HARDEST_FIRST if need in needs), None)
    return [*deleted, *([] if hardest is None else [_repair(cache, hardest, teacher)])]


def mending_command(cache: str, problem: "Problem", report: "Report", teacher: str | None) -> str:
    """The command that puts one problem of a report right by itself."""
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
    """As the messages of problems name it."""
    return cache.rstrip("/") if is_remote(cache) else str(Path(cache))


def other_way(report: "Report") -> str | None:
    """What else would do, beside the last of the commands; None if nothing."""
    needs = {need_of(problem, report) for problem in report.problems}
    if "copy" in needs:
        return "without a copy: the build command given again writes prompts and tokenizer anew"
    return "with another copy of the cache: --from COPY in place of --teacher" if "shard" in needs else None


def problem_lines(cache: str, report: "Report", teacher: str | None, *, width: int | None) -> list[str]:
    """A table of what is wrong, and the commands that put it right. width: see entry_lines."""
    rows = [[_shard(problem), problem.path, short_message(cache, problem)] for problem in report.problems]
    head = ["shard", "file", "problem"]
    if width is None:
        lines = table_lines(head, rows, text_columns=(0, 1, 2))
    else:
        # Checksums alone are longer than a line: the problem stands below its file.
        shards = max(len(row[0]) for row in (head, *rows))
        margin = " " * (shards + 2)
        lines = [f"{head[0]:<{shards}}  file, and below it the problem"]
        for shard, path, text in rows:
            lines += [f"{shard:<{shards}}  {path}"]
            lines += [f"{margin}  {line}" for line in wrapped(text, width=width - len(margin) - 2)]
    commands = mending_commands(cache, report, teacher)
    other = other_way(report)
    return [
        *lines,
        "to put it right:",
        *(f"  {command}" for command in commands),
        *([] if other is None else [f"  ({other})"]),
    ]


def mend_value(cache: str, report: "Report", teacher: str | None) -> dict[str, Any]:
    """The same for JSON."""
    return {"commands": mending_commands(cache, report, teacher), "otherwise": other_way(report)}


def short_message(cache: str, problem: "Problem") -> str:
    """A problem without the file's place, and without the ways out, which stand below the table."""
    text = problem.message
    for where in (f"{_location(cache)}/{problem.path} ", f"{_location(cache)} "):
        text = text.removeprefix(where)
    return text if problem.foreign else text.split(": ")[0]


def _shard(problem: "Problem") -> str:
    return "-" if problem.shard is None else f"{problem.shard[0]} {problem.shard[1]}"

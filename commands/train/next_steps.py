"""The closing lines of `train`: what to do with the student, as commands to copy."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from secondcast.api.names import POCKET
from secondcast.commands.shell.program import program

if TYPE_CHECKING:
    from secondcast.storage_schemas.reader import Cache


def next_lines(run: Path, caches: Mapping[str, "Cache"], *, backbone: str | None) -> list[str]:
    """Commands that score, show and export the student of a run.

    backbone: location of the transformer that the run was given; None: as recorded.
    """
    sampled = [cache for cache in caches.values() if not cache.manifest.is_text]
    cache = next(iter(sampled or caches.values()))
    teacher = backbone or cache.manifest.source
    score = []
    if sampled:
        recorded = ["--backbone", teacher] if backbone else []
        score = [["evaluate", "score", str(run), "--cache", cache.location, *recorded]]
    if teacher == POCKET:
        score = [["evaluate", "score", str(run), "--pocket"]]
    generate = ["generate", str(run), "--teacher", teacher, "--prompts", "-", "--out", f"{run}-pictures"]
    return [
        "Next:",
        *(f"  {_command(words)}" for words in score),
        f"  echo {shlex.quote(_prompt(cache))} | {_command(generate)}",
        f"  {_command(['export', str(run), f'{run}-student'])}",
    ]


def _prompt(cache: "Cache") -> str:
    """A held-out prompt of a cache if it has one; never an empty one, such as a negative prompt."""
    texts = ((prompt.held_out, " ".join(prompt.text.split())) for prompt in cache.prompts)
    first = ""
    for held_out, text in texts:
        if held_out and text:
            return text
        first = first or text
    return first


def _command(words: list[str]) -> str:
    return f"{program()} {shlex.join(words)}"

"""Prompts from files: one per line, or a JSON list of strings. Distinct texts, in the order of first sight."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from storage_schemas.errors import BadPrompts
from storage_schemas.prompts import normalised, prompt_id


@dataclass(frozen=True, kw_only=True)
class SourcedText:
    """A distinct prompt text with the names of all sources it came from."""

    text: str
    sources: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class PromptsRead:
    """What was read: distinct texts, and how many lines were empty or repeated."""

    texts: tuple[SourcedText, ...]
    empty: int
    repeated: int


def read_prompts(files: Sequence[Path], *, limit: int | None) -> PromptsRead:
    """Read prompt files; `limit` keeps the first that many distinct prompts. A source is named by its file's stem.

    Raises BadPrompts for a file that is missing, empty, binary, or JSON of another shape.
    """
    sources: dict[str, list[str]] = {}
    texts: dict[str, str] = {}
    empty = repeated = 0
    for file in files:
        lines = _lines(file)
        found = 0
        for line in lines:
            text = normalised(line)
            if not text:
                empty += 1
                continue
            found += 1
            identity = prompt_id(text)
            repeated += identity in texts
            texts.setdefault(identity, text)
            names = sources.setdefault(identity, [])
            if file.stem not in names:
                names.append(file.stem)
        if not found:
            raise BadPrompts(f"{file} holds no prompt ({len(lines)} lines, all empty): expected one prompt per line")
    kept = list(texts.items())[:limit]
    distinct = tuple(SourcedText(text=text, sources=tuple(sources[identity])) for identity, text in kept)
    return PromptsRead(texts=distinct, empty=empty, repeated=repeated)


def _lines(file: Path) -> list[str]:
    if not file.is_file():
        raise BadPrompts(f"no prompt file {file}: expected a text file (a prompt per line) or a JSON list of strings")
    data = file.read_bytes()
    if not data.strip():
        raise BadPrompts(f"{file} is empty: expected one prompt per line, or a JSON list of strings")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadPrompts(
            f"{file} is not UTF-8 text (byte {error.start} is 0x{data[error.start]:02x}): expected one prompt per "
            f"line; save it as UTF-8"
        ) from error
    if "\0" in text:
        raise BadPrompts(f"{file} is a binary file (it has a zero byte): expected one prompt per line")
    # Not splitlines: a prompt may hold a form feed or a Unicode line separator.
    return _json_list(file, text) if file.suffix == ".json" else text.removesuffix("\n").split("\n")


def _json_list(file: Path, text: str) -> list[str]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise BadPrompts(f"{file} is not JSON ({error}): expected a list of strings") from error
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        found = type(value).__name__ if not isinstance(value, list) else "a list with other than strings"
        raise BadPrompts(f"{file} holds {found}, expected a list of strings")
    return value

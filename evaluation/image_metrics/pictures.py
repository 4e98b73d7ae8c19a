"""Pictures of a folder with what is known of them: from its index, or from a file of prompts."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from secondcast.evaluation.image_metrics.metric import Picture
from secondcast.evaluation.pictures.folder import INDEX_FILE, IndexEntry
from secondcast.storage_schemas.errors import ImagesError, PromptsError
from secondcast.storage_schemas.progress import counted
from secondcast.storage_schemas.schema.manifest import Record, stays_inside
from secondcast.storage_schemas.schema.prompts import prompt_id

_COLUMNS = ("file", "text", "phrases")
_MISNAMED = {"file_name": "file", "filename": "file", "phrase": "phrases"}
# Of a pairing that is printed.
_MOST_PAIRS, _LONGEST_PROMPT = 12, 80
_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class PictureText(Record):
    """A prompt of a picture: file names the picture, text is what should be written in it, phrases its things."""

    prompt: str
    file: str | None = None
    text: str | None = None
    phrases: tuple[str, ...] | None = None


def read_pictures(folder: Path, texts: Sequence[PictureText] | None = None) -> list[Picture]:
    """The pictures of a folder, in the order of its index, else of their names: 2.png before 10.png.

    texts: for a folder with an index they add `text` and `phrases` to the same prompts; for another they are its
    prompts, by `file`, else in the order of the names. Raises ImagesError or PromptsError.
    """
    if not folder.is_dir():
        raise ImagesError(
            f"no folder {folder}: expected one that `secondcast generate` wrote, or one of pictures with --prompts FILE"
        )
    index = folder / INDEX_FILE
    if index.is_file():
        pictures = _indexed(folder, index)
        return pictures if texts is None else _with_more(folder, pictures, texts)
    # Files that are named may all lie in subfolders.
    if texts is not None and any(text.file is not None for text in texts):
        return _by_file(folder, texts)
    pictures = _listed(folder)
    if texts is None:
        return pictures
    if len(texts) != len(pictures):
        raise PromptsError(
            f"{folder} has {counted(len(pictures), 'picture')} and --prompts {counted(len(texts), 'prompt')}: expected "
            f"as many, in the order of the names, or JSON lines whose `file` names the picture"
        )
    return [_described(picture, text) for picture, text in zip(pictures, texts, strict=True)]


def picture_text(prompt: str, columns: Mapping[str, Any], where: str) -> PictureText:
    """The prompt of a picture, and of the other columns of its row `file`, `text` and `phrases` where they are there.

    where: the row, for messages. Raises PromptsError for what is not text (phrases: a list of texts), and for columns
    that are named almost so.
    """
    for column, meant in _MISNAMED.items():
        if column in columns:
            raise PromptsError(f"{where} has the column {column!r}, expected {meant!r}: rename it")
    try:
        return PictureText(prompt=prompt, **{column: columns.get(column) or None for column in _COLUMNS})
    except ValidationError as error:
        first = error.errors()[0]
        raise PromptsError(
            f"{where}, column {'.'.join(map(str, first['loc']))!r}: {first['msg']}: expected file and text as text, "
            f"phrases as a list of texts (in JSON)"
        ) from error


def _indexed(folder: Path, index: Path) -> list[Picture]:
    pictures = []
    for number, line in enumerate(index.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = IndexEntry.model_validate_json(line)
        except ValueError as error:
            raise ImagesError(
                f"{index} line {number} is not what `secondcast generate` writes: give its command again, or remove "
                f"{INDEX_FILE} and give --prompts FILE"
            ) from error
        if not stays_inside(entry.file) or not (folder / entry.file).is_file():
            raise ImagesError(
                f"{index} line {number} names {entry.file}, which is not there: give the command of "
                f"`secondcast generate` again, which makes what is missing"
            )
        pictures.append(Picture(file=folder / entry.file, name=entry.file, prompt=entry.prompt))
    if not pictures:
        raise ImagesError(f"{index} names no picture: give the command of `secondcast generate` again")
    _check_once(pictures, str(index))
    return pictures


def _listed(folder: Path) -> list[Picture]:
    found = (file for file in folder.iterdir() if file.suffix.lower() in _ENDINGS and not _hidden(file))
    files = sorted(found, key=lambda file: natural_key(file.name))
    if not files:
        raise ImagesError(f"{folder} holds no picture: expected files such as 000000.png ({', '.join(_ENDINGS)})")
    return [Picture(file=file, name=file.name) for file in files]


def natural_key(name: str) -> tuple[Any, ...]:
    """A name as it is ordered: by its numbers where it has some, whatever zeros they begin with, then as it is."""
    # Text and digits alternate, so that a number is only compared with another.
    parts = re.split(r"([0-9]+)", name)
    return ([int(part) if place % 2 else part for place, part in enumerate(parts)], name)


def paired_by_order(folder: Path, texts: Sequence[PictureText] | None) -> bool:
    """Whether read_pictures gives prompts to the pictures of a folder by their order alone."""
    return bool(texts) and not (folder / INDEX_FILE).is_file() and all(text.file is None for text in texts or ())


def pairing_lines(folder: Path, pictures: Sequence[Picture]) -> list[str]:
    """Which prompt belongs to which picture, for people to check: all of a few, else the first ones and the last."""
    shown = [*pictures] if len(pictures) <= _MOST_PAIRS else [*pictures[: _MOST_PAIRS - 1], pictures[-1]]
    lines = [f"{folder}: prompts belong to pictures in the order of their names; a `file` in JSON lines says otherwise"]
    for picture in shown:
        prompt = picture.prompt or ""
        lines.append(
            f"  {picture.name}: {prompt if len(prompt) <= _LONGEST_PROMPT else f'{prompt[:_LONGEST_PROMPT]}...'}"
        )
    if left := len(pictures) - len(shown):
        lines.insert(-1, f"  ({counted(left, 'more picture')})")
    return lines


def _hidden(file: Path) -> bool:
    return file.name.startswith(".")


def _described(picture: Picture, text: PictureText) -> Picture:
    return replace(picture, prompt=text.prompt, text=text.text, phrases=text.phrases)


def _with_more(folder: Path, pictures: Sequence[Picture], texts: Sequence[PictureText]) -> list[Picture]:
    by_prompt = {prompt_id(text.prompt): text for text in texts}
    found = [by_prompt.get(prompt_id(picture.prompt or "")) for picture in pictures]
    if not any(found):
        raise PromptsError(f"--prompts has none of the prompts in {folder / INDEX_FILE}: give those of these pictures")
    return [
        picture if text is None else _described(picture, text) for picture, text in zip(pictures, found, strict=True)
    ]


def _by_file(folder: Path, texts: Sequence[PictureText]) -> list[Picture]:
    pictures = []
    for text in texts:
        if text.file is None:
            raise PromptsError(f"--prompts has no `file` for {text.prompt!r}, but for others: expected all or none")
        if not stays_inside(text.file) or not (folder / text.file).is_file():
            raise ImagesError(f"{folder} has no {text.file}, which --prompts names: expected a picture of this folder")
        pictures.append(_described(Picture(file=folder / text.file, name=text.file), text))
    _check_once(pictures, "--prompts")
    return pictures


def _check_once(pictures: Sequence[Picture], where: str) -> None:
    seen: set[Path] = set()
    for picture in pictures:
        if picture.file in seen:
            raise PromptsError(
                f"{where} names {picture.name} more than once: expected each picture with one prompt, for it has one "
                f"value; name it once"
            )
        seen.add(picture.file)

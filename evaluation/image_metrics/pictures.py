"""Images of a folder with their prompts, from its index or from a file of prompts."""

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
from secondcast.storage_schemas.schema.json_files import Record, stays_inside
from secondcast.storage_schemas.schema.prompts import prompt_id

_COLUMNS = ("file", "text", "phrases", "phrases_by", "without_adjectives")
_MISNAMED = {"file_name": "file", "filename": "file", "phrase": "phrases"}
# Lengths of a printed pairing.
_MOST_PAIRS, _LONGEST_PROMPT = 12, 80
_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class PictureText(Record):
    """Prompt of an image: `file` names the image, `text` is the text to render, `phrases` the objects to show.

    The other fields: see Picture.
    """

    prompt: str
    file: str | None = None
    text: str | None = None
    phrases: tuple[str, ...] | None = None
    phrases_by: str | None = None
    without_adjectives: str | None = None
    categories: tuple[str, ...] = ()


def read_pictures(folder: Path, texts: Sequence[PictureText] | None = None) -> list[Picture]:
    """The images of a folder, in the order of its index, else of their names: 2.png before 10.png.

    texts: for a folder with an index, they add to its prompts what they have; otherwise they are the prompts,
        matched by `file`, else in the order of the names. Raises ImagesError or PromptsError.
    """
    if not folder.is_dir():
        raise ImagesError(
            f"no folder {folder}: expected the output of `secondcast generate`, or images with --prompts FILE"
        )
    index = folder / INDEX_FILE
    if index.is_file():
        pictures = _indexed(folder, index)
        return pictures if texts is None else _with_more(folder, pictures, texts)
    # The named files may all be in subfolders.
    if texts is not None and any(text.file is not None for text in texts):
        return _by_file(folder, texts)
    pictures = _listed(folder)
    if texts is None:
        return pictures
    if len(texts) != len(pictures):
        raise PromptsError(
            f"{folder} has {counted(len(pictures), 'image')} and --prompts {counted(len(texts), 'prompt')}: expected "
            f"equal numbers, in the order of the names, or JSON lines whose `file` names the image"
        )
    return [_described(picture, text) for picture, text in zip(pictures, texts, strict=True)]


def picture_text(
    prompt: str, columns: Mapping[str, Any], where: str, *, categories: tuple[str, ...] = ()
) -> PictureText:
    """The prompt of an image, with the fields of PictureText from the other columns of its row, if present.

    where: the row, for messages. categories: its source names. Raises PromptsError for values that are not text
    (phrases: a list of texts), and for columns with similar names.
    """
    for column, meant in _MISNAMED.items():
        if column in columns:
            raise PromptsError(f"{where} has the column {column!r}, expected {meant!r}: rename it")
    try:
        # An empty list of phrases is a statement, an empty cell is none.
        given = {column: value for column in _COLUMNS if (value := columns.get(column)) not in ("", None)}
        return PictureText(prompt=prompt, categories=categories, **given)
    except ValidationError as error:
        first = error.errors()[0]
        raise PromptsError(
            f"{where}, column {'.'.join(map(str, first['loc']))!r}: {first['msg']}: expected file and text as strings, "
            f"phrases as a list of strings (in JSON)"
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
                f"{index} line {number} was not written by `secondcast generate`: rerun that command, or remove "
                f"{INDEX_FILE} and give --prompts FILE"
            ) from error
        if not stays_inside(entry.file) or not (folder / entry.file).is_file():
            raise ImagesError(
                f"{index} line {number} names {entry.file}, which does not exist: rerun the `secondcast generate` "
                f"command, which makes missing images"
            )
        pictures.append(
            Picture(file=folder / entry.file, name=entry.file, prompt=entry.prompt, categories=entry.categories)
        )
    if not pictures:
        raise ImagesError(f"{index} names no image: rerun the `secondcast generate` command")
    _check_once(pictures, str(index))
    return pictures


def _listed(folder: Path) -> list[Picture]:
    found = (file for file in folder.iterdir() if file.suffix.lower() in _ENDINGS and not _hidden(file))
    files = sorted(found, key=lambda file: natural_key(file.name))
    if not files:
        raise ImagesError(f"{folder} has no image: expected files such as 000000.png ({', '.join(_ENDINGS)})")
    return [Picture(file=file, name=file.name) for file in files]


def natural_key(name: str) -> tuple[Any, ...]:
    """Sort key of a name: natural order of its numbers, then the name itself."""
    # Text and digits alternate, so that numbers are only compared with numbers.
    parts = re.split(r"([0-9]+)", name)
    return ([int(part) if place % 2 else part for place, part in enumerate(parts)], name)


def paired_by_order(folder: Path, texts: Sequence[PictureText] | None) -> bool:
    """Whether read_pictures assigns prompts to the images of a folder by order alone."""
    return bool(texts) and not (folder / INDEX_FILE).is_file() and all(text.file is None for text in texts or ())


def pairing_lines(folder: Path, pictures: Sequence[Picture]) -> list[str]:
    """The pairing of images and prompts for the user to check: all of a few, else the first ones and the last."""
    shown = [*pictures] if len(pictures) <= _MOST_PAIRS else [*pictures[: _MOST_PAIRS - 1], pictures[-1]]
    lines = [
        f"{folder}: prompts are matched to images in the order of their names; to change it, give `file` in JSON lines"
    ]
    for picture in shown:
        prompt = picture.prompt or ""
        lines.append(
            f"  {picture.name}: {prompt if len(prompt) <= _LONGEST_PROMPT else f'{prompt[:_LONGEST_PROMPT]}...'}"
        )
    if left := len(pictures) - len(shown):
        lines.insert(-1, f"  ({counted(left, 'more image')})")
    return lines


def _hidden(file: Path) -> bool:
    return file.name.startswith(".")


def _described(picture: Picture, text: PictureText) -> Picture:
    stated = {key: value for key, value in text if key not in ("file", "categories")}
    return replace(picture, **stated, categories=text.categories or picture.categories)


def _with_more(folder: Path, pictures: Sequence[Picture], texts: Sequence[PictureText]) -> list[Picture]:
    by_prompt: dict[str, PictureText] = {}
    for text in texts:
        # A prompt with several source names may have a line for each.
        before = by_prompt.get(prompt_id(text.prompt))
        categories = tuple(dict.fromkeys((*(before.categories if before else ()), *text.categories)))
        by_prompt[prompt_id(text.prompt)] = text.model_copy(update={"categories": categories})
    found = [by_prompt.get(prompt_id(picture.prompt or "")) for picture in pictures]
    if not any(found):
        raise PromptsError(f"--prompts has none of the prompts in {folder / INDEX_FILE}: give those of these images")
    return [
        picture if text is None else _described(picture, text) for picture, text in zip(pictures, found, strict=True)
    ]


def _by_file(folder: Path, texts: Sequence[PictureText]) -> list[Picture]:
    pictures = []
    for text in texts:
        if text.file is None:
            raise PromptsError(f"--prompts has no `file` for {text.prompt!r}, but for others: expected all or none")
        if not stays_inside(text.file) or not (folder / text.file).is_file():
            raise ImagesError(f"{folder} has no {text.file}, which --prompts names: expected an image of this folder")
        pictures.append(_described(Picture(file=folder / text.file, name=text.file), text))
    _check_once(pictures, "--prompts")
    return pictures


def _check_once(pictures: Sequence[Picture], where: str) -> None:
    seen: set[Path] = set()
    for picture in pictures:
        if picture.file in seen:
            raise PromptsError(
                f"{where} names {picture.name} more than once: an image has one score, hence one prompt; name it once"
            )
        seen.add(picture.file)

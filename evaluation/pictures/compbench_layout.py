"""Folders of images as T2I-CompBench's scripts read them: `CATEGORY/samples/PROMPT_NUMBER.png`."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from secondcast.storage_schemas.errors import ImagesError, SettingsError
from secondcast.storage_schemas.schema.prompts import prompt_id

_FOLDER = "samples"
_LONGEST_NAME_BYTES = 255
# A slash is a folder; the scripts take the prompt to end at the first underscore.
_NOT_IN_NAMES = ("/", "_", "\0", "\n", "\r")


class PromptedImage(Protocol):
    """An image with its prompt and the source names of the prompt."""

    @property
    def file(self) -> Path:
        """Path of the image."""
        ...

    @property
    def prompt(self) -> str | None:
        """Its prompt, if known."""
        ...

    @property
    def categories(self) -> tuple[str, ...]:
        """Source names of the prompt."""
        ...


def write_layout(images: Sequence[PromptedImage], out: Path, categories: Sequence[str]) -> dict[str, int]:
    """Write the images of each category, as hard links where possible; return their numbers.

    Numbers count the images of a category, those of one prompt in succession, prompts in order of appearance. Raises
    SettingsError for an existing folder with files, ImagesError for images that the layout cannot name.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SettingsError(f"{out} exists, expected a new folder: give another --out")
    planned = {category: _named(images, category) for category in categories}
    planned = {category: files for category, files in planned.items() if files}
    if not planned:
        raise ImagesError(
            f"no image has one of the categories {', '.join(categories)}: generate them from the file of `secondcast "
            f"prompts compbench --split val`, or give it with --prompts"
        )
    for category, files in planned.items():
        folder = out / category / _FOLDER
        folder.mkdir(parents=True)
        for name, file in files.items():
            _link_or_copy(file, folder / name)
    return {category: len(files) for category, files in planned.items()}


def _named(images: Sequence[PromptedImage], category: str) -> dict[str, Path]:
    """Images of a category by their new names, in order."""
    by_prompt: dict[str, list[tuple[str, Path]]] = {}
    for image in images:
        if category in image.categories and image.prompt is not None:
            by_prompt.setdefault(prompt_id(image.prompt), []).append((image.prompt, image.file))
    ordered = [image for group in by_prompt.values() for image in group]
    return {_name(prompt, number, file): file for number, (prompt, file) in enumerate(ordered)}


def _name(prompt: str, number: int, file: Path) -> str:
    if file.suffix.lower() != ".png":
        raise ImagesError(f"{file} is not a PNG file, as T2I-CompBench's scripts expect: convert it")
    name = f"{prompt}_{number:06d}.png"
    if bad := next((character for character in _NOT_IN_NAMES if character in prompt), None):
        raise ImagesError(
            f"the prompt {prompt!r} has {bad!r}, which the file names of T2I-CompBench's scripts cannot have: leave it "
            f"out of its categories"
        )
    if (length := len(name.encode())) > _LONGEST_NAME_BYTES:
        raise ImagesError(
            f"the prompt {prompt[:60]!r}... makes a file name of {length} bytes, and names have at most "
            f"{_LONGEST_NAME_BYTES}: leave it out of its categories"
        )
    return name


def _link_or_copy(file: Path, to: Path) -> None:
    try:
        os.link(file, to)
    except OSError:
        # Another file system, or one without hard links.
        shutil.copyfile(file, to)

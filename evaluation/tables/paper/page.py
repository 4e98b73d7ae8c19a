"""The page of a table: scores, plots, and images side by side. It loads the files beside it and no script."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from urllib.parse import quote

from jinja2 import Environment, Template

from secondcast.evaluation.image_metrics.metric import Picture
from secondcast.evaluation.tables.paper.making import Making, pictures_of
from secondcast.evaluation.tables.paper.results import PaperTable, about, name_of, notes
from secondcast.storage_schemas.errors import ImagesError, SecondcastError
from secondcast.storage_schemas.progress import counted

_SHOWN = 24
_PLOTS = {
    "scaling.png": "Score against the number of parameters of the text encoder; the teacher's are lines.",
    "embeddings.png": "t-SNE of the mean over tokens of each prompt's embedding, all text encoders in one map.",
}
# Images of the pocket are enlarged without smoothing.
_SMALL_PIXELS, _SMALL_SIDE, _SIDE = 64, 84, 150


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A prompt with its image of each row: name and relative file."""

    prompt: str
    files: list[tuple[str, str]]


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """The first prompts of a set."""

    name: str
    text: str
    prompts: list[Shown]
    small: bool

    @property
    def side(self) -> int:
        """The least width of an image, in CSS pixels."""
        return _SMALL_SIDE if self.small else _SIDE


def page(making: Making, table: PaperTable, title: str, files: Iterable[str]) -> bytes:
    """The page as UTF-8. files: those of the folder, of which plots are shown."""
    text = _template().render(
        title=title,
        table=table,
        names=[name_of(row) for row in table.rows],
        about=about,
        notes=notes(table),
        plots=[(file, text) for file, text in _PLOTS.items() if file in files],
        galleries=[gallery for name in making.prompts if (gallery := _gallery(making, table, name)).prompts],
    )
    return text.encode("utf-8", errors="replace")


@cache
def _template() -> Template:
    text = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
    return Environment(autoescape=True).from_string(text)


def _gallery(making: Making, table: PaperTable, name: str) -> Gallery:
    folders: dict[str, list[Picture]] = {}
    for row in table.rows:
        try:
            folders[name_of(row)] = pictures_of(making, row.name, name)
        # A row that failed has no images.
        except SecondcastError:
            continue
    by_name = {row: {picture.name: picture for picture in pictures} for row, pictures in folders.items()}
    every = list(dict.fromkeys(picture.name for pictures in folders.values() for picture in pictures))
    shown = []
    for file in every[:_SHOWN]:
        found = {row: pictures[file] for row, pictures in by_name.items() if file in pictures}
        prompt = next(iter(found.values())).prompt or ""
        files = [(row, quote(str(picture.file.relative_to(making.folder)))) for row, picture in found.items()]
        shown.append(Shown(prompt=prompt, files=files))
    more = f"; the first {_SHOWN} are shown" if len(every) > _SHOWN else ""
    pictures = [picture for row in folders.values() for picture in row]
    return Gallery(
        name=name,
        text=f"{counted(len(every), 'image')} per text encoder, from the same noise{more}.",
        prompts=shown,
        small=bool(pictures) and _is_small(pictures[0]),
    )


def _is_small(picture: Picture) -> bool:
    try:
        return max(picture.pixels().size) <= _SMALL_PIXELS
    # A broken image is reported by its score.
    except ImagesError:
        return False

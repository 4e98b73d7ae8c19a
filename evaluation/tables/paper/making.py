"""Makes the images of a table and scores them; what exists is kept, and a failed cell does not stop the others."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import TypeAdapter, ValidationError

from secondcast.evaluation.generate import generate
from secondcast.evaluation.image_metrics.chosen import metric_of
from secondcast.evaluation.image_metrics.compbench import is_final
from secondcast.evaluation.image_metrics.metric import Metric, MetricName, Picture, Scored
from secondcast.evaluation.image_metrics.pictures import PictureText, read_pictures
from secondcast.evaluation.image_metrics.scoring import score_folders
from secondcast.evaluation.pictures.folder import INDEX_FILE, SETTINGS_FILE, picture_name
from secondcast.evaluation.tables.paper.recipe import TableRecipe, TableRow
from secondcast.evaluation.tables.scored_rows import computed_by, installed
from secondcast.evaluation.text_encoder import teacher_parts
from secondcast.models.families.family import Role
from secondcast.models.memory.limit import free_bytes
from secondcast.models.memory.options import SamplingMemory
from secondcast.models.teacher.folder import TeacherFolder
from secondcast.storage_schemas.errors import SecondcastError, SettingsMismatchError, reason
from secondcast.storage_schemas.io import durable
from secondcast.storage_schemas.io.digests import digest, xxh3_128
from secondcast.storage_schemas.progress import Progress, counted

IMAGES, SCORES = "images", "scores"
"""Folders of the output."""
FAILURES = (SecondcastError, torch.OutOfMemoryError)
"""What fails a cell; any other error is a fault of the program, and stops it."""
_SCORED_AT_ONCE = 16
_SCORES: TypeAdapter[list[Scored]] = TypeAdapter(list[Scored])

FindTeacher = Callable[[str, tuple[Role, ...]], TeacherFolder]


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """The distinct prompts of a set with their source names, and what its metrics read."""

    prompts: Sequence[str]
    categories: Sequence[tuple[str, ...]]
    texts: Sequence[PictureText]


@dataclass(frozen=True, kw_only=True)
class Making:
    """How a table is made; batch_size: number of images sampled at once."""

    recipe: TableRecipe
    prompts: Mapping[str, Prompts]
    folder: Path
    find_teacher: FindTeacher
    memory: SamplingMemory
    batch_size: int
    device: torch.device
    progress: Progress

    def teacher(self, row: TableRow) -> TeacherFolder:
        """The teacher of a row, with the parts that its images need."""
        return self.find_teacher(row.teacher, teacher_parts(row.student, row.pooled))

    def images(self, row: str, prompts: str) -> Path:
        """The folder of the images of a row for a set of prompts."""
        return self.folder / IMAGES / folder_name(row) / folder_name(prompts)


def folder_name(name: str) -> str:
    """A readable folder name that depends on the name alone, so that rows can be added anywhere."""
    plain = "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in name).strip("-.")
    return f"{plain}-{digest(name)[:6]}"


def check_references(making: Making) -> None:
    """Raise ImagesError for a folder of reference images without any, before hours of sampling."""
    for prompts in making.recipe.prompts.values():
        if prompts.reference is not None and prompts.reference not in making.recipe.rows:
            read_pictures(Path(prompts.reference))


def make_images(making: Making) -> dict[tuple[str, str], str]:
    """Generate what is missing; reasons of failures by row and prompts."""
    failed: dict[tuple[str, str], str] = {}
    limit = making.memory.max_gpu_memory
    memory_bytes = None if limit is None else free_bytes(limit, making.device)
    for row_name, row in making.recipe.rows.items():
        for name, prompts in making.prompts.items():
            asked = row.asked(making.recipe.prompts[name].samples_per_prompt)
            try:
                made = generate(
                    row.student, making.teacher(row), prompts.prompts, making.images(row_name, name), asked,
                    batch_size=making.batch_size, device=making.device, progress=making.progress,
                    memory=making.memory, memory_bytes=memory_bytes, categories=prompts.categories,
                )  # fmt: skip
            except FAILURES as error:
                why = reason(error)
                if isinstance(error, SettingsMismatchError):
                    why += f", or remove {making.images(row_name, name)}"
                failed[row_name, name] = why
                making.progress.say(f"{row_name}, {name}: failed: {why}")
                continue
            making.progress.say(f"{row_name}, {name}: {counted(made, 'new image')}")
    return failed


def score_images(
    making: Making, failed: Mapping[tuple[str, str], str]
) -> Iterator[tuple[str, str, MetricName, list[Scored] | str]]:
    """Row, prompts, metric, and its scores or the reason why there are none."""
    for name in making.recipe.prompts:
        rows = [row for row in making.recipe.rows if (row, name) not in failed]
        for metric in making.recipe.prompts[name].metrics:
            for row in making.recipe.rows:
                if row not in rows:
                    yield row, name, metric, failed[row, name]
            for row, found in _scores_of(making, name, metric, rows, failed).items():
                yield row, name, metric, found


def _scores_of(
    making: Making, name: str, metric: MetricName, rows: Sequence[str], failed: Mapping[tuple[str, str], str]
) -> dict[str, list[Scored] | str]:
    """The scores of all rows by one metric, whose network is loaded once, and only if a score is missing."""
    asked = making.recipe.prompts[name]
    against = asked.reference if metric == "fid" else None
    if against is not None and (against, name) in failed:
        return {row: f"its reference failed: {failed[against, name]}" for row in rows}
    found: dict[str, list[Scored] | str] = {}
    try:
        reference = [] if against is None else _reference(making, name, against)
        scorer = metric_of(metric, making.recipe.networks, reference, batch_size=_SCORED_AT_ONCE, device=making.device)
    except FAILURES as error:
        return dict.fromkeys(rows, reason(error))
    for row in rows:
        try:
            found[row] = _scores(making, row, name, scorer, reference)
        except FAILURES as error:
            found[row] = reason(error)
    return found


def _scores(making: Making, row: str, name: str, scorer: Metric, reference: Sequence[Picture]) -> list[Scored] | str:
    """The scores of a row by one metric, kept at once; or why there are none."""
    pictures = pictures_of(making, row, name)
    key = _key(making, row, name, scorer, reference)
    if (kept := _kept(making.folder, key)) is not None:
        return kept
    report = score_folders([scorer], {row: pictures}, making.progress)
    if report.skipped:
        return report.skipped[0].why
    scores = list(report.scored[row])
    if all(map(is_final, scores)):
        durable.replace(_file(making.folder, key), _SCORES.dump_json(scores, indent=1))
    return scores


def pictures_of(making: Making, row: str, name: str) -> list[Picture]:
    """The images of a row for a set of prompts, without those of earlier recipes. Raises ImagesError, PromptsError."""
    samples = range(making.recipe.prompts[name].samples_per_prompt)
    asked = {
        picture_name(number, prompt, sample)
        for number, prompt in enumerate(making.prompts[name].prompts)
        for sample in samples
    }
    found = read_pictures(making.images(row, name), making.prompts[name].texts)
    return [picture for picture in found if picture.name in asked]


def _reference(making: Making, name: str, against: str) -> list[Picture]:
    if against in making.recipe.rows:
        return pictures_of(making, against, name)
    return read_pictures(Path(against))


def _key(making: Making, row: str, name: str, scorer: Metric, reference: Sequence[Picture]) -> dict[str, str]:
    """Everything that the scores of a row depend on."""
    folder, texts = making.images(row, name), making.prompts[name].texts
    files = [folder / SETTINGS_FILE, folder / INDEX_FILE]
    asked = making.recipe.prompts[name]
    networks = making.recipe.networks.json_value()
    return {
        "metric": scorer.name,
        "images": digest([xxh3_128(file.read_bytes()) for file in files]),
        "texts": digest(
            [[text.json_value() for text in texts], making.prompts[name].prompts, asked.samples_per_prompt]
        ),
        "networks": digest([networks, [_state(str(value)) for value in networks.values()]]),
        "packages": digest([installed(package) for package in scorer.needs.packages]),
        "reference": digest([[picture.name, picture.file.stat().st_mtime_ns] for picture in reference]),
        **computed_by(str(making.device)),
    }


def _state(place: str) -> list[list[object]]:
    """Names, sizes and times of the files of a local network; empty for a hub name."""
    path = Path(place)
    files = sorted(path.iterdir()) if path.is_dir() else [path] if path.is_file() else []
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _kept(folder: Path, key: Mapping[str, str]) -> list[Scored] | None:
    try:
        return _SCORES.validate_json(_file(folder, key).read_bytes())
    except (FileNotFoundError, ValidationError):
        return None


def _file(folder: Path, key: Mapping[str, str]) -> Path:
    scores = folder / SCORES
    scores.mkdir(parents=True, exist_ok=True)
    return scores / f"{digest(dict(key))[:24]}.json"

"""The recipe of `evaluate paper`: text encoders as rows, prompts with their metrics as columns."""

from pathlib import Path
from typing import Any, Self, TypeVar

from pydantic import Field, ValidationError, model_validator

from secondcast.evaluation.image_metrics.metric import MetricName
from secondcast.evaluation.settings.generating import TEACHER, GenerateOptions
from secondcast.evaluation.settings.networks import Networks
from secondcast.storage_schemas.errors import SettingsError
from secondcast.storage_schemas.io.home import expand_home
from secondcast.storage_schemas.io.toml_file import read_toml
from secondcast.storage_schemas.schema.json_files import Record
from secondcast.storage_schemas.schema.problems import first_problem

_Made = TypeVar("_Made", bound=Record)
_EXPECTED = "tables [prompts.NAME] and [rows.NAME], and any [generate] and [metrics], see recipes/tables/"


class PromptSet(Record):
    """Prompts and their metrics, a column for each score.

    source: as for build --prompts, without its keys name, limit and repeat.
    limit: number of prompts, the first ones; None: all.
    samples_per_prompt: images per prompt, each from its own noise.
    reference: for fid, the name of a row, whose images of these prompts are meant, or a folder.
    """

    source: tuple[str, ...] = Field(min_length=1)
    metrics: tuple[MetricName, ...] = Field(min_length=1)
    limit: int | None = Field(default=None, ge=1)
    samples_per_prompt: int = Field(default=1, ge=1)
    reference: str | None = None

    @model_validator(mode="after")
    def _fid_has_a_reference(self) -> Self:
        if ("fid" in self.metrics) != (self.reference is not None):
            raise ValueError("expected fid in metrics and reference (a row, or a folder of images) together")
        return self


class TableRow(GenerateOptions):
    """A text encoder, and how images are generated with it: options of `generate`.

    student: a run folder, an export, or `teacher`.
    teacher: as for generate.
    """

    student: str
    teacher: str

    @model_validator(mode="after")
    def _samples_belong_to_the_prompts(self) -> Self:
        if "samples_per_prompt" in self.model_fields_set:
            raise ValueError("samples-per-prompt is a key of [prompts.NAME], not of a row: move it")
        return self

    def asked(self, samples_per_prompt: int) -> GenerateOptions:
        """The options of `generate`."""
        own = TableRow.model_fields.keys() - GenerateOptions.model_fields.keys()
        given = {name: value for name, value in self.given.items() if name not in own}
        return GenerateOptions(**given, samples_per_prompt=samples_per_prompt)


class TableRecipe(Record):
    """Rows and prompts by name, in the order of the file."""

    networks: Networks
    prompts: dict[str, PromptSet] = Field(min_length=1)
    rows: dict[str, TableRow] = Field(min_length=1)

    def changes(self, name: str) -> dict[str, Any]:
        """The options of a row that differ from those of most rows, other than those of its text encoder."""
        keys = sorted(TableRow.model_fields.keys() - {"student", "quantize_text_encoder"})
        return {key: own for key in keys if (own := getattr(self.rows[name], key)) != self._usual(key)}

    def _usual(self, key: str) -> Any:
        values = [getattr(row, key) for row in self.rows.values()]
        return max(values, key=values.count)


def read_recipe(file: Path) -> TableRecipe:
    """Read a recipe. Raises SettingsError that names the table and the key."""
    values = read_toml(file, what=f"recipe {file}", expected=_EXPECTED)
    if unknown := sorted(values.keys() - {"generate", "metrics", "prompts", "rows"}):
        raise SettingsError(f"{file} has {unknown[0]!r}, expected {_EXPECTED}")
    for name in ("generate", "metrics"):
        if not isinstance(values.get(name, {}), dict):
            raise SettingsError(f"{file} has {name} = {values[name]!r}, expected a table, as in [{name}]")
    for name in ("prompts", "rows"):
        tables = values.get(name)
        if not isinstance(tables, dict) or not tables or not all(isinstance(one, dict) for one in tables.values()):
            raise SettingsError(f"{file} has no [{name}.NAME], expected {_EXPECTED}")
    common = values.get("generate", {})
    recipe = TableRecipe(
        networks=_made(Networks, file, "metrics", _fields(values.get("metrics", {}))),
        prompts={
            name: _made(PromptSet, file, f"prompts.{name}", _fields(one)) for name, one in values["prompts"].items()
        },
        rows={
            name: _made(TableRow, file, f"rows.{name}", common | _fields(one)) for name, one in values["rows"].items()
        },
    )
    _check_references(file, recipe)
    return recipe


def _fields(table: dict[str, Any]) -> dict[str, Any]:
    fields = {key.replace("-", "_"): _at_home(value) for key, value in table.items()}
    if isinstance(source := fields.get("source"), str):
        fields["source"] = [source]
    return fields


def _at_home(value: Any) -> Any:
    if isinstance(value, list):
        return [_at_home(one) for one in value]
    return expand_home(value) if isinstance(value, str) else value


def _made(kind: type[_Made], file: Path, table: str, values: dict[str, Any]) -> _Made:
    try:
        return kind(**_fields(values))
    except (ValidationError, SettingsError) as error:
        problem = first_problem(error).replace("_", "-") if isinstance(error, ValidationError) else str(error)
        raise SettingsError(f"{file}, [{table}]: {problem}") from error


def _check_references(file: Path, recipe: TableRecipe) -> None:
    for name, prompts in recipe.prompts.items():
        reference = prompts.reference
        if reference is not None and reference not in recipe.rows and not Path(reference).is_dir():
            raise SettingsError(
                f"{file}, [prompts.{name}]: reference is {reference!r}, expected a row ({', '.join(recipe.rows)}) or a "
                f"folder of images"
            )


def is_baseline(row: TableRow) -> bool:
    """Whether a row has the teacher's text encoder, in any form."""
    return row.student == TEACHER

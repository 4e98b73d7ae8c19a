"""Rows of a check, and the file that keeps them: a check that is run again takes up those that it has."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self

from pydantic import ValidationError

from secondcast.storage_schemas.errors import SettingsError
from secondcast.storage_schemas.schema.json_files import Record
from secondcast.storage_schemas.schema.problems import problem_text

RESULTS_FILE = "check.json"
Result = Literal["holds", "broken", "measured", "not run"]


class CheckRow(Record):
    """A row: a claim, whether it holds here, and what was measured.

    detail: how far it holds, or why it was not run.
    step_seconds: median of an optimizer step. matrix_rate_fraction: its FLOP/s as a fraction of the matrix rate.
    picture_seconds: from prompt to picture; text_seconds of them for the text embedding.
    peak_bytes, reserved_bytes: of the GPU, allocated and reserved; planned_bytes: allocated, by calculation.
    """

    name: str
    claim: str = ""
    result: Result
    detail: str = ""
    step_seconds: float | None = None
    matrix_rate_fraction: float | None = None
    picture_seconds: float | None = None
    text_seconds: float | None = None
    peak_bytes: int | None = None
    reserved_bytes: int | None = None
    planned_bytes: int | None = None


class Machine(Record):
    """Where a check was run; rates are measured, in the dtype of the teacher.

    copy_bytes_per_second: from pinned host memory to the GPU; None on a CPU, like total_bytes, driver and cudnn.
    """

    device: str
    total_bytes: int | None = None
    driver: str | None = None
    cudnn: int | None = None
    torch: str
    diffusers: str
    transformers: str
    threads: int
    matrix_flops_per_second: float
    copy_bytes_per_second: float | None = None

    def differs_from(self, other: "Machine") -> str | None:
        """The first field that is not measured and differs, with both values; None if all agree."""
        for name in type(self).model_fields:
            if not name.endswith("_second") and getattr(self, name) != getattr(other, name):
                return f"{name} is {getattr(self, name)}, was {getattr(other, name)}"
        return None


class CheckResults(Record):
    """Contents of RESULTS_FILE. date: of the first row, YYYY-MM-DD."""

    format: Literal["secondcast-check"] = "secondcast-check"
    version: str
    date: str
    teacher: str
    machine: Machine
    rows: tuple[CheckRow, ...] = ()

    def row(self, name: str) -> CheckRow | None:
        """A row by its name."""
        return next((row for row in self.rows if row.name == name), None)

    def with_row(self, row: CheckRow) -> Self:
        """With a row in place of an earlier one of that name, or at the end."""
        rows = [row if one.name == row.name else one for one in self.rows]
        return self.model_copy(update={"rows": tuple(rows if row in rows else [*rows, row])})

    @property
    def broken(self) -> tuple[str, ...]:
        """Names of the rows that do not hold."""
        return tuple(row.name for row in self.rows if row.result == "broken")

    def encoded(self) -> bytes:
        """As a file."""
        return (json.dumps(self.json_value(), indent=1) + "\n").encode()


def read_results(file: Path) -> CheckResults:
    """The results in a file; SettingsError if it is none."""
    try:
        return CheckResults.model_validate_json(file.read_bytes())
    except OSError as error:
        raise SettingsError(f"{file} cannot be read ({error.strerror}), expected a {RESULTS_FILE}") from error
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"])) or "its contents"
        raise SettingsError(
            f"{file} is not a result of `secondcast check` ({problem_text(where, problem)}): give a {RESULTS_FILE} of "
            "this version"
        ) from error


def row_names(several: Sequence[CheckResults]) -> list[str]:
    """The names of all rows, in the order of the results."""
    return list(dict.fromkeys(row.name for results in several for row in results.rows))

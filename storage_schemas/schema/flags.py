"""Config models whose fields are the options of commands: each option is stated by its field, and nowhere else."""

from dataclasses import dataclass
from typing import Any, Self

from pydantic import ValidationError

from secondcast.storage_schemas.errors import SettingsError
from secondcast.storage_schemas.schema.manifest import Record, first_problem


@dataclass(frozen=True, kw_only=True)
class Shown:
    """How a field is shown as an option, beside its name, type, default and description.

    flag: its name on the command line, where that is not the field's.
    metavar: stands for the value in help texts.
    group: heading in help texts.
    rare: left out of --help; --help-all shows it.
    hidden: no option at all; a key of files, or given by the command itself.
    text: the default as a user would type it, where the field is parsed from text.
    """

    flag: str | None = None
    metavar: str | None = None
    group: str | None = None
    rare: bool = False
    hidden: bool = False
    text: str | None = None


class Flags(Record):
    """A frozen config model. The description of a field is the help text of its option."""

    @classmethod
    def from_flags(cls, **flags: Any) -> Self:
        """Validate options; SettingsError names the first one that is wrong."""
        try:
            return cls(**flags)
        except ValidationError as error:
            raise SettingsError(first_wrong_flag(error)) from error

    @property
    def given(self) -> dict[str, Any]:
        """The options that were given, by name; the others have their defaults."""
        return {name: getattr(self, name) for name in type(self).model_fields if name in self.model_fields_set}


def first_wrong_flag(error: ValidationError) -> str:
    """The first problem of a command's options: a field is named as its flag."""
    where = str(next(iter(error.errors()[0]["loc"]), ""))
    problem = first_problem(error)
    if not where:
        return problem.removeprefix("settings: ")
    return f"--{where.replace('_', '-')}{problem[len(where) :]}"

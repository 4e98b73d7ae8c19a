"""Config models whose fields are the options of commands: the field is the only definition of an option."""

from dataclasses import dataclass
from typing import Any, Self

from pydantic import ValidationError

from secondcast.storage_schemas.errors import SettingsError
from secondcast.storage_schemas.schema.json_files import Record
from secondcast.storage_schemas.schema.problems import first_problem


@dataclass(frozen=True, kw_only=True)
class Flag:
    """Presentation of a field as an option, beyond its name, type, default and description.

    flag: name on the command line, if different from the field's.
    metavar: placeholder of the value in help texts.
    group: heading in help texts.
    rare: shown by --help-all only.
    hidden: not an option; a config key, or set by the command itself.
    text: the default as a user types it, for a field parsed from text.
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
        """Validate options; SettingsError names the first invalid one."""
        try:
            return cls(**flags)
        except ValidationError as error:
            raise SettingsError(first_wrong_flag(error)) from error

    @property
    def given(self) -> dict[str, Any]:
        """The options that were set explicitly, by name."""
        return {name: getattr(self, name) for name in type(self).model_fields if name in self.model_fields_set}


def first_wrong_flag(error: ValidationError) -> str:
    """The first problem of a command's options, with the field named by its flag."""
    where = str(next(iter(error.errors()[0]["loc"]), ""))
    problem = first_problem(error)
    if not where:
        return problem.removeprefix("settings: ")
    return f"--{where.replace('_', '-')}{problem[len(where) :]}"

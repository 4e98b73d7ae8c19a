"""TOML files that users write: config files and recipes."""

import tomllib
from pathlib import Path
from typing import Any

from secondcast.storage_schemas.errors import SettingsError


def read_toml(file: Path, *, what: str, expected: str) -> dict[str, Any]:
    """Read a TOML file in UTF-8, with or without a byte order mark.

    what: purpose of the file for the message if it is missing, such as "file x.toml for --config".
    expected: expected content.
    Raises SettingsError.
    """
    try:
        return tomllib.loads(file.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise SettingsError(f"no {what}: expected {expected}") from error
    except UnicodeDecodeError as error:
        raise SettingsError(
            f"{file} cannot be read as TOML (byte {error.start} is not UTF-8): save it as UTF-8; expected {expected}"
        ) from error
    except (OSError, ValueError) as error:
        raise SettingsError(f"{file} cannot be read as TOML ({error}): expected {expected}") from error


TABLES = ("build", "init-student", "train")
"""Tables of a recipe: [build.NAME] for each cache, [init-student] for the student to start from, and [train]."""

EVIDENCE = "evidence"
"""Key of a recipe, beside its tables: what is known about the quality of its student, for its plan."""

_LISTED = "[build.NAME] for each cache, [init-student] and [train]"


def recipe_tables(file: Path, values: dict[str, Any]) -> dict[str, Any] | None:
    """The tables of a recipe; None for a config file of one command. Raises SettingsError for a mixture."""
    if not any(isinstance(values.get(name), dict) for name in TABLES):
        return None
    values = dict(values)
    if not isinstance(evidence := values.pop(EVIDENCE, ""), str):
        raise SettingsError(f"{file} has evidence = {evidence!r}, expected text: what is known about its student")
    if other := sorted(values.keys() - set(TABLES)):
        raise SettingsError(f"{file} has {other[0]!r} beside its tables: expected only {_LISTED}")
    if other := [name for name, table in values.items() if not isinstance(table, dict)]:
        raise SettingsError(
            f"{file} has {other[0]} = {values[other[0]]!r}, expected a table; the tables of a recipe are {_LISTED}"
        )
    if not all(isinstance(table, dict) for table in values.get("build", {}).values()):
        raise SettingsError(f"{file} has a [build] without a name: expected {_LISTED}")
    return values

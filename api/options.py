"""Keyword arguments of the Python API: the options of a command, by the names of their fields."""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from secondcast.api.terminal import Terminal
from secondcast.storage_schemas.errors import SettingsError
from secondcast.storage_schemas.progress import Progress, Silent
from secondcast.storage_schemas.schema.flags import Flags


def options_of(function: str, options: Mapping[str, Any], *models: type[Flags]) -> list[dict[str, Any]]:
    """The options of each model, in the order of the models; SettingsError for one that none of them has."""
    known = {name for model in models for name in model.model_fields}
    for name in options:
        if name not in known:
            close = get_close_matches(name, sorted(known), n=1)
            hint = f"did you mean {close[0]}?" if close else "see docs/options.md for the options of the command"
            raise SettingsError(f"{function}() has no option {name!r} (its value is {options[name]!r}): {hint}")
    return [{name: value for name, value in options.items() if name in model.model_fields} for model in models]


def display(progress: bool | Progress) -> Progress:
    """Where a job reports its progress: on stderr (True), nowhere (False), or as given."""
    if isinstance(progress, bool):
        return Terminal() if progress else Silent()
    return progress

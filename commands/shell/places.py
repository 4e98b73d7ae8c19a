"""Arguments and options that name a place: `~` is expanded in them, wherever their value comes from."""

from typing import Any

from typer.core import TyperGroup

from secondcast.storage_schemas.io.home import expand_home

PLACES = frozenset({
    "a", "b", "backbone", "cache", "clip_model", "config", "copy", "disk", "evaluations", "fid_weights", "folder",
    "folders", "ids", "local_cache_dir", "ocr_model", "out", "out_file", "out_path", "sample_grid", "prompts", "ray_runtime_env",
    "recipe", "reference", "run", "runs", "source", "sources", "student", "students", "target", "teacher",
    "vqa_model",
})  # fmt: skip
"""Names of these parameters in the functions of commands: files, folders, and what may also be elsewhere."""


class GroupOfPlaces(TyperGroup):
    """A group whose commands, and those of its groups, have `~` expanded in what names a place."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        for command in self.commands.values():
            _expand_in(command)


def _expand_in(command: Any) -> None:
    for below in getattr(command, "commands", {}).values():
        _expand_in(below)
    for parameter in command.params:
        if parameter.name in PLACES:
            parameter.process_value = _Expanding(parameter.process_value)


class _Expanding:
    """Converts the value of a parameter, from the command line or a settings file, after `~` is expanded in it."""

    def __init__(self, convert: Any) -> None:
        self._convert = convert

    def __call__(self, ctx: Any, value: Any) -> Any:
        return self._convert(ctx, _expanded(value))


def _expanded(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_expanded(one) for one in value)
    return expand_home(value) if isinstance(value, str) else value

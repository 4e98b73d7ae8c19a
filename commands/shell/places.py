"""Arguments and options that name a path: `~` is expanded in their value from any source."""

from typing import Any

from typer.core import TyperGroup

from secondcast.storage_schemas.io.home import expand_home

PLACES = frozenset({
    "a", "b", "backbone", "cache", "clip_model", "compbench_clip_model", "config", "control_images",
    "controlnet", "copy", "disk", "evaluations", "fid_weights", "folder", "folders", "ids", "local_cache_dir", "lora",
    "ocr_model", "out", "out_file", "out_path", "phrases", "prompts", "ray_runtime_env", "recipe", "reference", "run",
    "runs", "sample_grid", "scores", "source", "sources", "student", "students", "target", "teacher", "vqa_model",
})  # fmt: skip
"""Names of such parameters in the functions of commands; some also accept a hub name or a URL."""


class GroupOfPlaces(TyperGroup):
    """A group that expands `~` in the path parameters of its commands, recursively."""

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
    """Expands `~` in the value of a parameter, from the command line or a settings file, then converts it."""

    def __init__(self, convert: Any) -> None:
        self._convert = convert

    def __call__(self, ctx: Any, value: Any) -> Any:
        return self._convert(ctx, _expanded(value))


def _expanded(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_expanded(item) for item in value)
    return expand_home(value) if isinstance(value, str) else value

"""`--config FILE`: options of a command as keys of a TOML file, or a recipe with the options of several commands."""

from pathlib import Path
from typing import Annotated, Any

import typer

from secondcast.commands.shell.familiar_flags import close_advice, familiar_advice
from secondcast.storage_schemas.errors import SettingsError
from secondcast.storage_schemas.io.toml_file import read_toml, recipe_tables
from secondcast.trainer.settings import TrainSettings

# Keys of a run with stages that are not options of the command: recipe.py reads them.
_OF_A_RUN = {*TrainSettings.model_fields, "stage", "caches", "time_budget"}
# Options that say what this call prints, or which file it reads.
_NOT_KEYS = {"config", "help_all"}


def read_config(context: typer.Context, given: Path | None) -> Path | None:
    """Take defaults of a command's options from a TOML file; returns the file without its :NAME."""
    if given is None:
        return None
    file, name = _file_and_name(given)
    values = read_toml(file, what=f"file {file} for --config", expected="lines such as batch-size = 32, or a recipe")
    tables, command = recipe_tables(file, values), str(context.info_name)
    if tables is not None:
        values = _own_table(file, name, tables, command)
    elif name is not None:
        raise SettingsError(f"--config {given} names {name!r}, but {file} has no [build.NAME]: give the file alone")
    names = _names_by_key(context)
    options = {names.get(name := key.replace("-", "_"), name): value for key, value in values.items()}
    # `stage` is an option of build, but a table of a run.
    if command == "train" and "stage" in options:
        options = {key: value for key, value in options.items() if key not in _OF_A_RUN}
    if tables is not None and "plan" in context.command_path.split():
        # A plan ignores options that only the planned command has.
        options = {key: value for key, value in options.items() if key not in _names_of(context, command)}
    _check_known(context, file, options)
    several = {parameter.name for parameter in context.command.params if getattr(parameter, "multiple", False)}
    context.default_map = {
        key: [value] if key in several and not isinstance(value, list) else value for key, value in options.items()
    }
    return file


Config = Annotated[
    Path | None,
    typer.Option(
        is_eager=True,
        metavar="FILE[:NAME]",
        callback=read_config,
        help="TOML file with any of these options as keys, or a recipe; NAME selects its table [build.NAME].",
    ),
]


def has_stages(config: Path | None) -> bool:
    """Whether a file states the stages of a run."""
    if config is None:
        return False
    values = read_toml(config, what=f"file {config} for --config", expected="a recipe")
    tables = recipe_tables(config, values)
    return "stage" in (values if tables is None else tables.get("train", {}))


def _file_and_name(given: Path) -> tuple[Path, str | None]:
    file, sign, name = str(given).rpartition(":")
    if not sign or "/" in name or given.exists():
        return given, None
    return Path(file), name


def _own_table(file: Path, name: str | None, tables: dict[str, Any], command: str) -> dict[str, Any]:
    if command == "build":
        builds = tables.get("build", {})
        if name is None and len(builds) == 1:
            return dict(next(iter(builds.values())))
        if name not in builds:
            listed = ", ".join(builds) or "none"
            raise SettingsError(
                f"{file} has the builds {listed}: select one, as in --config {file}:{next(iter(builds), 'NAME')}"
            )
        return dict(builds[name])
    if command not in tables:
        raise SettingsError(f"{file} has no [{command}]: it has {', '.join(f'[{table}]' for table in tables)}")
    if name is not None:
        raise SettingsError(f"--config {file}:{name} names a build, but this command is {command}: give the file alone")
    return dict(tables[command])


def _names_of(context: typer.Context, command: str) -> set[str]:
    """Options of the command of this name that its plan does not have."""
    group: Any = context.find_root().command
    own = {str(parameter.name) for parameter in context.command.params}
    return {str(parameter.name) for parameter in group.commands[command].params} - own


def _names_by_key(context: typer.Context) -> dict[str, str]:
    """Names of a command's parameters by key, which is the flag where that differs."""
    return {
        flag.lstrip("-").replace("-", "_"): str(parameter.name)
        for parameter in context.command.params
        for flag in parameter.opts
        if flag.startswith("--") or not flag.startswith("-")
    }


def _check_known(context: typer.Context, file: Path, options: dict[str, Any]) -> None:
    keys = {name: key for key, name in _names_by_key(context).items() if name not in _NOT_KEYS}
    if unknown := sorted(options.keys() - keys.keys()):
        own = {flag for parameter in context.command.params for flag in parameter.opts}
        where = context.command_path.partition(" ")[2]
        advice = familiar_advice(unknown[0], where, own) or close_advice(unknown[0], where, own)
        listed = ", ".join(sorted(key.replace("_", "-") for key in keys.values()))
        expected = f": {advice[0].lower()}{advice[1:].replace('--', '')}" if advice else f", expected one of {listed}"
        raise SettingsError(f"{file} has the unknown key {unknown[0]!r}{expected}")

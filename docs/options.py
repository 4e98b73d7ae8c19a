"""Write docs/options.md, every option of every command as the command line has it: `python -m docs.options`."""

from pathlib import Path
from typing import Any

import typer

from secondcast import cli
from secondcast.commands.shell.flags import in_one_style

FILE = Path(__file__).with_name("options.md")
_HEAD = """# Options

Made by `python -m docs.options` from the config models of the commands. Most commands take their options as keys of a
TOML file too (`--config FILE`; keys have no dashes in front). An option on the command line precedes the file, and the
file precedes the default.
"""


def commands(group: Any, name: str) -> list[tuple[str, Any]]:
    """All commands below a group, by what is typed."""
    below = getattr(group, "commands", None)
    if below is None:
        return [(name, group)]
    return [found for key, command in below.items() for found in commands(command, f"{name} {key}")]


def page() -> str:
    """The page as text."""
    sections = [_section(name, command) for name, command in commands(typer.main.get_command(cli.app), "secondcast")]
    return "\n".join([_HEAD, *sections])


def _section(name: str, command: Any) -> str:
    context = command.make_context(name, [], resilient_parsing=True)
    rows = []
    for parameter in command.params:
        if parameter.param_type_name == "option" and parameter.name != "help_all":
            parameter.hidden = False
            names, text = in_one_style(parameter.get_help_record(context))
            # The default has a column of its own.
            text = text.partition("  [")[0]
            rows.append(f"| `{_cell(names)}` | {_default(parameter)} | {_cell(text)} |")
    return "\n".join([f"## {name}", "", "| option | default | |", "|---|---|---|", *rows, ""])


def _default(parameter: Any) -> str:
    shown = parameter.show_default if isinstance(parameter.show_default, str) else parameter.default
    if parameter.required:
        return "required"
    return "" if shown in (None, False, "", [], ()) else f"`{shown}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    FILE.write_text(page(), encoding="utf-8")

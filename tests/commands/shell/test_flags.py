"""Options come from config models, and each is stated once."""

import ast
import inspect
from typing import Annotated, Literal, get_args

import pytest
import typer
from pydantic import Field
from typer.models import OptionInfo

from secondcast import cli
from secondcast.commands.shell.flags import GroupedCommand, add_command
from secondcast.storage_schemas.errors import SettingsError
from secondcast.storage_schemas.schema.flags import Flag, Flags
from tests.project.test_imports import MODULES


class Base(Flags):
    size: Annotated[int | None, Flag(group="Shape", metavar="N")] = Field(default=None, ge=1, le=9, description="S.")


class Sample(Base):
    name: str = Field(description="Needed.")
    kind: Literal["a"] | Literal["b", "c"] = Field(default="a", description="K.")
    on: bool = Field(default=False, description="O.")
    off: bool = Field(default=True, description="F.")
    rare: Annotated[float, Flag(rare=True)] = Field(default=0.5, gt=0, lt=1, description="R.")
    many: tuple[str, ...] = Field(default=(), description="M.")
    inner: Annotated[int, Flag(hidden=True)] = 3


def run(*words):
    taken = []

    def command(sample: Sample, other: int = 1) -> None:
        """Do it."""
        taken.append((sample, other))

    app = typer.Typer(rich_markup_mode=None)
    add_command(app, command)
    app(list(words), standalone_mode=False)
    return taken


def test_a_config_model_is_made_of_the_options_that_were_given():
    [(sample, other)] = run("--name", "x", "--kind", "c", "--no-off", "--many", "1", "--many", "2", "--other", "5")
    assert sample == Sample(name="x", kind="c", off=False, many=("1", "2")) and other == 5
    assert sample.model_fields_set == {"name", "kind", "off", "many"} == set(sample.given)


def test_a_value_out_of_range_is_one_line_that_names_the_flag():
    with pytest.raises(SettingsError, match=r"^--size is 10, expected at most 9$"):
        run("--name", "x", "--size", "10")


def test_help_shows_groups_ranges_and_defaults_and_rare_options_only_on_request(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    run("--help")
    said = capsys.readouterr().out
    assert "Shape:\n  --size N  S. [from 1 to 9]\n" in said
    assert "--kind <a|b|c>" in said and "[default: a]" in said and "[required]" in said
    assert "--rare" not in said and "--inner" not in said and "--no-on" not in said and "--no-off" in said
    run("--help-all")
    assert "--rare <float>" in capsys.readouterr().out


def test_a_range_that_typer_states_reads_as_those_of_config_models(capsys):
    def command(
        count: Annotated[int, typer.Option(min=1, help="C.")] = 3,
        share: Annotated[float | None, typer.Option(min=0, max=1, help="S.")] = None,
        needed: Annotated[int, typer.Option(min=2, help="N.")] = ...,
    ) -> None:
        """Do it."""

    app = typer.Typer(rich_markup_mode=None, add_completion=False)
    app.command(cls=GroupedCommand)(command)
    app(["--help"], standalone_mode=False)
    said = capsys.readouterr().out
    assert "--count <int>    C. [from 1]  [default: 3]\n" in said
    assert "--share <float>  S. [from 0 to 1]\n" in said and "--needed <int>   N. [from 2]  [required]\n" in said


def test_an_option_that_two_models_state_is_an_error_of_the_program():
    def command(one: Base, other: Sample) -> None:
        pass

    with pytest.raises(ValueError, match="command has the option size twice"):
        add_command(typer.Typer(), command)


def commands(app, prefix=""):
    for group in app.registered_groups:
        yield from commands(group.typer_instance, f"{prefix}{group.name} ")
    for command in app.registered_commands:
        yield f"{prefix}{command.name or command.callback.__name__}", command.callback


def statements():
    """Of each option of each command: what states it, a field's class or an annotation, and its help."""
    for _, callback in commands(cli.app):
        for parameter in inspect.signature(inspect.unwrap(callback)).parameters.values():
            if isinstance(parameter.annotation, type) and issubclass(parameter.annotation, Flags):
                for name, field in parameter.annotation.model_fields.items():
                    classes = reversed(parameter.annotation.__mro__)
                    owner = next(one for one in classes if name in getattr(one, "__annotations__", {}))
                    yield name, owner, field.description
            for option in get_args(parameter.annotation):
                if isinstance(option, OptionInfo):
                    yield parameter.name, id(option), option.help


def test_no_option_is_stated_twice():
    # Options of one name that are not the same, such as the seeds of a cache and of a run, say so in their help.
    helps, found = {}, list(statements())
    assert len(found) > 300
    for name, owner, text in found:
        first = helps.setdefault((name, text), owner)
        # A class may narrow what it inherits: the prompts of a plan need not be there.
        narrowed = isinstance(owner, type) and isinstance(first, type) and issubclass(owner, first)
        assert first == owner or narrowed, f"--{name}: {text!r} is stated twice"


@pytest.mark.thorough
def test_no_list_of_choices_is_written_twice():
    written = {}
    for module, file in MODULES.items():
        for node in ast.walk(ast.parse(file.read_text())):
            if (
                isinstance(node, ast.Subscript)
                and ast.unparse(node.value) == "Literal"
                and "," in ast.unparse(node.slice)
            ):
                choices = ast.unparse(node.slice)
                assert choices not in written, f"{module} and {written[choices]}: {choices}"
                written[choices] = module

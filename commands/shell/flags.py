"""Options of commands from config models: each field of a parameter's config model becomes an option."""

import inspect
import re
from collections.abc import Callable, Iterator
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic.fields import FieldInfo
from typer.core import TyperCommand
from typer.models import OptionInfo

from secondcast.commands.shell.console import print_lines
from secondcast.commands.shell.resolve import student_names, teacher_names
from secondcast.storage_schemas.schema.flags import Flag, Flags

_COMPLETIONS: dict[str, Callable[[str], list[str]]] = {"student": student_names, "teacher": teacher_names}
_PLAIN = (bool, int, float, str)
_BOUNDS = {"ge": "from {}", "gt": "above {}", "le": "to {}", "lt": "below {}"}
# Larger bounds only keep numbers within file or float limits, and are not shown.
_LARGEST_SHOWN = 1e5

_RANGE_OF_TYPER = re.compile(r"(?:(?<=\[)|; )(?:(\d\S*)<=)?x(?:>=([\d.]+)|<=([\d.]+))?(?:; |(?=\]))")

_LIST_OF = re.compile(r"<list\[(\w+)\]>")


class GroupedCommand(TyperCommand):
    """A command whose help groups options under the headings of their fields."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """See typer."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            if (record := parameter.get_help_record(ctx)) is not None:
                of_option = getattr(parameter, "rich_help_panel", None) or "Options"
                title = "Arguments" if parameter.param_type_name == "argument" else of_option
                sections.setdefault(title, []).append(in_one_style(record))
        first = [title for title in ("Arguments", "Options") if title in sections]
        for title in [*first, *(title for title in sections if title not in first)]:
            with formatter.section(title):
                formatter.write_dl(sections[title])


def in_one_style(record: tuple[str, str]) -> tuple[str, str]:
    """A line of help with the range that typer states, such as `[default: 1; x>=0]`, as config models state theirs."""
    term, text = record
    if (found := _RANGE_OF_TYPER.search(text)) is not None:
        low, high = found[1] or found[2], found[3]
        described, mark, rest = (text[: found.start()] + text[found.end() :]).removesuffix("  []").rpartition("  [")
        bounds = " ".join([f"from {low}"] * bool(low) + [f"to {high}"] * bool(high))
        text = f"{described}{'' if mark else rest} [{bounds}]{mark}{rest if mark else ''}"
    return _LIST_OF.sub(r"<\1>", term).replace(" range>", ">"), text


def add_command(app: typer.Typer, function: Callable[..., None], name: str | None = None) -> None:
    """Add a command to an app, with options for the fields of its config models."""
    app.command(name, cls=GroupedCommand)(with_flags(function))


def with_flags(function: Callable[..., None]) -> Callable[..., None]:
    """Wrap a function for typer: each parameter that is a config model is replaced by options for its fields.

    The model is built from the options given on the command line or in a file, so its `model_fields_set` names exactly
    those. An invalid model raises SettingsError.
    """
    signature = inspect.signature(function)
    models = {p.name: p.annotation for p in signature.parameters.values() if _is_model(p.annotation)}
    if not models:
        return function
    parameters: dict[str, inspect.Parameter] = {}
    for parameter in signature.parameters.values():
        for option in _options(parameter.annotation) if parameter.name in models else (parameter,):
            if option.name in parameters:
                raise ValueError(f"{function.__name__} has the option {option.name} twice")
            parameters[option.name] = option.replace(kind=inspect.Parameter.KEYWORD_ONLY)
    context_name = next((p.name for p in parameters.values() if p.annotation is typer.Context), None)
    if context_name is None:
        parameters["context"] = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)

    if any(getattr(_typer_option(parameter), "hidden", False) for parameter in parameters.values()):
        parameters["help_all"] = inspect.Parameter(
            "help_all", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=_HelpAll
        )

    def command(**values: Any) -> None:
        values.pop("help_all", None)
        context = values.pop("context") if context_name is None else values[context_name]
        configs = {}
        for name, model in models.items():
            options = {option.name: values.pop(option.name) for option in _options(model)}
            configs[name] = model.from_flags(**{key: v for key, v in options.items() if is_given(context, key)})
        function(**values, **configs)

    command.__name__, command.__doc__ = function.__name__, function.__doc__
    command.__wrapped__ = function  # type: ignore[attr-defined]
    command.__signature__ = inspect.Signature(list(parameters.values()))  # type: ignore[attr-defined]
    command.__annotations__ = {name: parameter.annotation for name, parameter in parameters.items()}
    return command


def _show_all(context: typer.Context, asked: bool) -> None:
    if asked:
        for parameter in context.command.params:
            parameter.hidden = False  # type: ignore[attr-defined]  # of options alone, and click shows all arguments
        print_lines(context.get_help().splitlines())
        raise typer.Exit


_HelpAll = Annotated[
    bool,
    typer.Option(
        "--help-all", is_eager=True, callback=_show_all, show_default=False, help="Show all options and exit."
    ),
]


def _typer_option(parameter: inspect.Parameter) -> Any:
    return next((one for one in get_args(parameter.annotation) if isinstance(one, OptionInfo)), None)


def is_given(context: typer.Context, name: str) -> bool:
    """Whether an option is given on the command line or in the file of --config."""
    # typer bundles its own copy of click from 0.29 on: compare the name of the enum member.
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Flags)


def _options(model: type[Flags]) -> Iterator[inspect.Parameter]:
    for name, field in model.model_fields.items():
        shown = next((one for one in field.metadata if isinstance(one, Flag)), Flag())
        if not shown.hidden:
            default = inspect.Parameter.empty if field.is_required() else _default(field)
            yield inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=default,
                annotation=Annotated[_option_type(field, shown), _option(name, field, shown)],
            )


def _option(name: str, field: FieldInfo, shown: Flag) -> OptionInfo:
    flag = shown.flag or f"--{name.replace('_', '-')}"
    # A switch that is off by default needs no --no- form.
    names = [flag] if shown.flag or (field.annotation is bool and field.default is False) else []
    described: dict[str, Any] = {"show_default": shown.text or False} if shown.text is not None else {}
    option: OptionInfo = typer.Option(
        *names,
        metavar=shown.metavar,
        help=_help(field),
        hidden=shown.rare,
        rich_help_panel=shown.group,
        autocompletion=_COMPLETIONS.get(name),
        **described,
    )
    return option


def _help(field: FieldInfo) -> str:
    """The description, and the range of a number."""
    bounds = [
        text.format(f"{bound:g}")
        for name, text in _BOUNDS.items()
        for one in field.metadata
        if (bound := getattr(one, name, None)) is not None and abs(bound) <= _LARGEST_SHOWN
    ]
    return (field.description or "") + (f" [{' '.join(bounds)}]" if bounds else "")


def _default(field: FieldInfo) -> Any:
    """The default for typer; None for a value that is parsed from text, whose default is shown by `text`."""
    return field.default if isinstance(field.default, _PLAIN) else None


def _option_type(field: FieldInfo, shown: Flag) -> Any:
    """The type of an option: the type of its field, but list[str] for a tuple, and str for a value parsed from text."""
    return str | None if shown.text is not None else _of_type(field.annotation)


def _of_type(annotation: Any) -> Any:
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _of_type(inner[0])
    if origin in (Union, UnionType):
        left = [_of_type(one) for one in inner if one is not NoneType]
        choices = tuple(choice for one in left for choice in get_args(one) if get_origin(one) is Literal)
        kind = Literal[choices] if choices else left[0]
        return kind | None if NoneType in inner else kind
    if origin is tuple:
        return list[str]
    return annotation

"""Printing for all commands, safe for any encoding of stdout and against escape sequences.

Foreign text (prompts, file names, run names) may contain escape sequences, or characters that the encoding of stdout
lacks. Every function here escapes both.
"""

import sys
import textwrap
import traceback
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import IO, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from secondcast.storage_schemas.io.printable import printable, printable_json

# Width of a table in a pipe or a file.
_ANY_WIDTH = 1000
TEXT_COLUMNS = 80
"""Width of wrapped text in a pipe or a file."""


def make_streams_safe() -> None:
    """Make stdout and stderr escape characters that they cannot encode, also for libraries and typer."""
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="backslashreplace")


def terminal_width() -> int | None:
    """Columns of the terminal; None for a file or a pipe, which gets whole lines."""
    console = _console()
    return console.width if console.is_terminal else None


def print_line(text: str, *, style: str | None = None) -> None:
    """Print one line as it is, without interpreting rich markup."""
    if style is None:
        print(_shown(text))
    else:
        _console().print(Text(_shown(text)), style=style)


def print_wrapped(text: str, *, style: str | None = None) -> None:
    """Print a text in lines as wide as the terminal (without one: TEXT_COLUMNS); words, such as flags, stay whole.

    All lines but the first are indented.
    """
    for line in _wrapped(text, indent=2):
        print_line(line, style=style)


def print_facts(rows: Mapping[str, str]) -> None:
    """Print names and values in two columns, wrapped as by print_wrapped."""
    column = max(map(len, rows)) + 2
    for name, value in rows.items():
        first, *others = _wrapped(f"{name:<{column}}{value}", indent=column)
        line = Text(first)
        line.stylize("bold", 0, len(name))
        _console().print(line)
        print_lines(others)


def print_lines(lines: Iterable[str]) -> None:
    """Print lines as they are."""
    for line in lines:
        print_line(line)


def print_json(value: Any) -> None:
    """Print a value as JSON."""
    print(printable_json(value, encoding=_encoding(sys.stdout)))


def print_error(message: str) -> None:
    """Print one line on stderr, prefixed with the program's name."""
    print_notice(f"secondcast: {' '.join(message.split())}")


def print_notice(text: str) -> None:
    """Print lines on stderr that are not part of the output."""
    if sys.stderr is None:
        # Without stderr, print() would write to stdout.
        return
    for line in text.split("\n"):
        print(printable(line, encoding=_encoding(sys.stderr)), file=sys.stderr)


def print_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print the traceback of a bug, whose message may contain foreign text; a sys.excepthook."""
    for part in traceback.format_exception(kind, error, trace):
        print_notice(part.rstrip("\n"))


class PlainTable(Table):
    """A rich table whose cells and headers are plain text: no markup, control characters escaped.

    A newline in a cell starts a new line of that cell.
    """

    def add_column(self, header: Any = "", *rest: Any, **options: Any) -> None:
        """See rich."""
        options.setdefault("overflow", "fold")
        super().add_column(_cell(header), *rest, **options)

    def add_row(self, *cells: Any, **options: Any) -> None:
        """See rich."""
        super().add_row(*map(_cell, cells), **options)


def print_table(table: PlainTable, *, columns: int = _ANY_WIDTH) -> None:
    """Print a table as wide as the terminal; long cells are folded.

    columns: largest width without a terminal.
    """
    console = _console()
    if not console.is_terminal:
        console = Console(file=sys.stdout, highlight=False, emoji=False, width=columns)
    console.print(table)


def _console() -> Console:
    # Without emoji: `:dog:` in a prompt is literal text. Created for each call, because stdout may be replaced.
    return Console(file=sys.stdout, highlight=False, soft_wrap=True, emoji=False)


def _wrapped(text: str, *, indent: int) -> list[str]:
    width, following = terminal_width() or TEXT_COLUMNS, " " * indent
    return textwrap.wrap(
        _shown(text), width, subsequent_indent=following, break_long_words=False, break_on_hyphens=False
    )  # fmt: skip


def _encoding(stream: IO[str]) -> str:
    return getattr(stream, "encoding", None) or "utf-8"


def _shown(text: str) -> str:
    return printable(text, encoding=_encoding(sys.stdout))


def _cell(cell: Any) -> Any:
    return Text("\n".join(map(_shown, cell.split("\n")))) if isinstance(cell, str) else cell

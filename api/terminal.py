"""Progress display: rich bars in a terminal, plain lines in a file or a pipe."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

from secondcast.storage_schemas.io.printable import printable
from secondcast.storage_schemas.progress import Bar, duration_text

_SECONDS_BETWEEN_LINES = 10.0
_REFRESHES_PER_SECOND = 4
# A step may take a minute, so rich's default of 30 seconds is too short to see two.
_SECONDS_OF_RATE = 600.0
# A terminal with fewer columns gets a short bar, without the elapsed time.
_WIDE = 110


class Terminal:
    """Shows jobs as bars with rate and remaining time, and messages as lines, all on stderr.

    A terminal that cannot move its cursor (TERM=dumb) gets lines, as files and pipes do.
    """

    def __init__(self, console: Console | None = None, *, quiet: bool = False) -> None:
        # CI systems set FORCE_COLOR, which makes rich treat a log as a terminal. stderr may be missing.
        shown = sys.stderr is not None
        self._console = console or Console(
            file=sys.stderr, highlight=False, emoji=False, force_terminal=shown and sys.stderr.isatty()
        )
        self._quiet = quiet or not (console or shown)

    def say(self, message: str) -> None:
        """Print one line, unless quiet."""
        if not self._quiet:
            self._console.print(self._shown(message), markup=False, soft_wrap=True)

    def _shown(self, text: str) -> str:
        return printable(text, encoding=self._console.encoding)

    @contextmanager
    def bar(self, title: str, *, total: int, done: int, unit: str) -> Iterator[Bar]:
        """A bar in a terminal, a line every ten seconds elsewhere."""
        if self._quiet or not self._console.is_terminal or self._console.is_dumb_terminal:
            lines = _Lines(self, title, total=total, done=done, unit=unit)
            yield lines
            lines.close()
            return
        with Progress(
            *_columns(unit, wide=self._console.width >= _WIDE),
            console=self._console,
            refresh_per_second=_REFRESHES_PER_SECOND,
            speed_estimate_period=_SECONDS_OF_RATE,
            # Output goes to stdout even while a bar is shown; rich would print it above the bar, on stderr.
            redirect_stdout=sys.stdout is not None and sys.stdout.isatty(),
        ) as progress:
            task = progress.add_task(self._shown(title), total=total, completed=done, rate="", note="")
            yield _RichBar(progress, task, self._shown)


class _Note(ProgressColumn):
    """The note beside a bar, truncated so that the numbers are never cut."""

    def render(self, task: Task) -> Text:
        return Text(str(task.fields["note"]), no_wrap=True, overflow="ellipsis")


def _columns(unit: str, *, wide: bool) -> list[ProgressColumn]:
    elapsed: list[ProgressColumn] = [TimeElapsedColumn(table_column=Column(no_wrap=True))] if wide else []
    return [
        # A title may be a run name that contains brackets.
        TextColumn("{task.description:>8}", markup=False),
        BarColumn(bar_width=30 if wide else 6, table_column=Column(no_wrap=True)),
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        TextColumn(f"{unit}  " + "{task.fields[rate]}"),
        *elapsed,
        TextColumn("left"),
        TimeRemainingColumn(table_column=Column(no_wrap=True)),
        _Note(),
    ]


class _RichBar:
    def __init__(self, progress: Progress, task: object, shown: Callable[[str], str]) -> None:
        self._progress, self._task, self._shown = progress, task, shown
        self._started, self._count = time.monotonic(), 0

    def advance(self, count: int, note: str = "") -> None:
        self._count += count
        rate = self._count / max(time.monotonic() - self._started, 1e-9)
        self._progress.update(self._task, advance=count, rate=_rate_text(rate), note=self._shown(note))  # type: ignore[arg-type]  # rich's TaskID is an int


class _Lines:
    def __init__(self, terminal: Terminal, title: str, *, total: int, done: int, unit: str) -> None:
        self._terminal, self._title, self._total, self._unit = terminal, title, total, unit
        self._done, self._first, self._shown_done = done, done, -1
        self._note = self._shown_note = ""
        self._started = self._shown = time.monotonic()

    def advance(self, count: int, note: str = "") -> None:
        self._done += count
        self._note = note or self._note
        if time.monotonic() - self._shown >= _SECONDS_BETWEEN_LINES:
            self._shown = time.monotonic()
            self._show()

    def close(self) -> None:
        if (self._shown_done, self._shown_note) != (self._done, self._note) or self._done == self._first:
            self._show()

    def _show(self) -> None:
        self._shown_done, self._shown_note = self._done, self._note
        seconds = max(time.monotonic() - self._started, 1e-9)
        rate = (self._done - self._first) / seconds
        left = f", {duration_text((self._total - self._done) / rate)} left" if rate and self._done < self._total else ""
        note = f", {self._note}" if self._note else ""
        self._terminal.say(
            f"{self._title}: {self._done} of {self._total} {self._unit}, {_rate_text(rate)}, {duration_text(seconds)}"
            f"{left}{note}"
        )


def _rate_text(per_second: float) -> str:
    """A rate, or seconds per unit where one takes longer than ten seconds."""
    return f"{1 / per_second:,.1f} s each" if 0 < per_second < 0.1 else f"{per_second:.2f}/s"

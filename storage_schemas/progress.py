"""The interface through which a long job reports progress, independent of how it is displayed."""

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol


class Bar(Protocol):
    """Progress bar of one running job."""

    def advance(self, count: int, note: str = "") -> None:
        """Advance by `count` units; `note` is shown beside the bar."""
        ...


class Progress(Protocol):
    """Displays progress bars and messages."""

    def bar(self, title: str, *, total: int, done: int, unit: str) -> AbstractContextManager[Bar]:
        """Open a progress bar of `total` units, `done` of which are already done."""
        ...

    def say(self, message: str) -> None:
        """Print one line."""
        ...


class Silent:
    """Displays nothing."""

    def bar(self, title: str, *, total: int, done: int, unit: str) -> AbstractContextManager[Bar]:
        """See Progress."""
        return nullcontext(self)

    def advance(self, count: int, note: str = "") -> None:
        """See Bar."""

    def say(self, message: str) -> None:
        """See Progress."""


def duration_text(seconds: float) -> str:
    """Format a duration in one unit: 46 s, 12 min, 12.6 h."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f}".removesuffix(".0") + " h"


def counted(count: int, noun: str) -> str:
    """Format a count with its noun in agreement: 1 shard, 2 shards, 1,200 trajectories, 3 batches."""
    if count == 1:
        return f"1 {noun}"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        noun = f"{noun[:-1]}ie"
    elif noun.endswith(("s", "x", "ch", "sh")):
        noun = f"{noun}e"
    return f"{count:,} {noun}s"


def size_text(count: int) -> str:
    """Format a number of bytes: 1.5 MiB."""
    value = float(count)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:,.0f} {unit}" if unit == "bytes" else f"{value:,.1f} {unit}"
        value /= 1024
    return f"{value:,.1f} TiB"

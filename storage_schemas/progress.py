"""What a long job tells about itself, so that rooms that work need not know how it is shown."""

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol


class Bar(Protocol):
    """One running job."""

    def advance(self, count: int, note: str = "") -> None:
        """`count` more are done; `note` is shown beside the bar."""
        ...


class Progress(Protocol):
    """Shows jobs and messages."""

    def bar(self, title: str, *, total: int, done: int, unit: str) -> AbstractContextManager[Bar]:
        """A job of `total` units, `done` of which were done before."""
        ...

    def say(self, message: str) -> None:
        """One line."""
        ...


class Silent:
    """Shows nothing."""

    def bar(self, title: str, *, total: int, done: int, unit: str) -> AbstractContextManager[Bar]:
        """See Progress."""
        return nullcontext(self)

    def advance(self, count: int, note: str = "") -> None:
        """See Bar."""

    def say(self, message: str) -> None:
        """See Progress."""


def duration_text(seconds: float) -> str:
    """A time for people, in one unit: 46 s, 12 min, 12.6 h."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f}".removesuffix(".0") + " h"


def counted(count: int, noun: str) -> str:
    """A number and its noun, which agree: 1 shard, 2 shards, 1,200 trajectories, 3 batches."""
    if count == 1:
        return f"1 {noun}"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        noun = f"{noun[:-1]}ie"
    elif noun.endswith(("s", "x", "ch", "sh")):
        noun = f"{noun}e"
    return f"{count:,} {noun}s"


def size_text(count: int) -> str:
    """Bytes for people: 1.5 MiB."""
    value = float(count)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:,.0f} {unit}" if unit == "bytes" else f"{value:,.1f} {unit}"
        value /= 1024
    return f"{value:,.1f} TiB"

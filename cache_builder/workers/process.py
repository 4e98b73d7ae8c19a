"""One worker of `build --workers N`: a job on stdin, progress and the end as JSON lines on stdout.

When stdin ends, so does the worker, as by Ctrl-C: what it has in hand is committed first.
"""

import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, TextIO

from secondcast.storage_schemas.errors import SecondcastError
from secondcast.storage_schemas.progress import Bar

INTERRUPTED = 130


class JsonLines:
    """Progress as JSON lines. See Progress."""

    def __init__(self, channel: TextIO) -> None:
        self._channel = channel

    def send(self, **event: Any) -> None:
        """One event."""
        print(json.dumps(event), file=self._channel, flush=True)

    @contextmanager
    def bar(self, title: str, *, total: int, done: int, unit: str) -> Iterator[Bar]:
        """See Progress."""
        yield _JsonBar(self, title)

    def say(self, message: str) -> None:
        """See Progress."""
        self.send(event="say", message=message)


class _JsonBar:
    def __init__(self, lines: JsonLines, title: str) -> None:
        self._lines, self._title = lines, title

    def advance(self, count: int, note: str = "") -> None:
        self._lines.send(event="advance", title=self._title, count=count, note=note)


def main() -> int:
    """Do the job; exit codes as those of the command line."""
    lines = JsonLines(_own_stdout())
    for number in (signal.SIGINT, signal.SIGTERM):
        # A shell starts what runs in its background with SIGINT ignored.
        signal.signal(number, _interrupt_once)
    try:
        if not (job := sys.stdin.readline()):
            return INTERRUPTED
        threading.Thread(target=_end_with_stdin, daemon=True).start()
        _work(job, lines)
    except KeyboardInterrupt:
        return INTERRUPTED
    except (SecondcastError, OSError) as error:
        lines.send(event="error", message=_one_line(error))
        return 1
    except Exception as error:
        if type(error).__name__ != "OutOfMemoryError":
            raise
        lines.send(event="error", message="the GPU is out of memory: lower --batch-size; what was committed stays")
        return 1
    return 0


def _work(line: str, lines: JsonLines) -> None:
    from secondcast.cache_builder.build import build_shards
    from secondcast.cache_builder.shard_builder import ShardBuilder
    from secondcast.cache_builder.workers.job import Job
    from secondcast.models.device import quiet_libraries, usable_device

    quiet_libraries()
    told = json.loads(line)
    device = usable_device(told.pop("device"))
    job = Job.model_validate(told)
    job.begin()
    writer = job.writer()
    teacher = job.find_teacher(writer.manifest.teacher.pooled)
    builder = ShardBuilder(writer, teacher, job.config, device, lines)
    build_shards(writer, builder, job.config, lines)
    for stage, peak in builder.peaks.items():
        lines.send(event="peak", stage=stage, **asdict(peak))


def _own_stdout() -> TextIO:
    """The real stdout for us alone; what libraries print goes to stderr."""
    channel = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return channel


def _interrupt_once(*_: object) -> None:
    # Slurm signals every process, and then the parent ends its workers too: what is in hand is committed all the same.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def _end_with_stdin() -> None:
    while sys.stdin.readline():
        pass
    os.kill(os.getpid(), signal.SIGINT)


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"{error.filename or 'a file'}: {error.strerror or error}"
    return str(error)


if __name__ == "__main__":
    sys.exit(main())

"""Several workers on this machine, each a process: shards by number, one sum of their progress, one end for all."""

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch

from secondcast.cache_builder.worker import Stage, Worker, WorkerConfig
from secondcast.cache_builder.workers.job import Job
from secondcast.models.memory.options import AUTO
from secondcast.models.memory.peak import PeakMemory, largest_peaks
from secondcast.models.teacher.folder import TeacherFolder
from secondcast.storage_schemas.errors import SettingsError, WorkerFailedError
from secondcast.storage_schemas.progress import Bar, Progress, Silent, counted
from secondcast.storage_schemas.schema.commits import Kind
from secondcast.storage_schemas.schema.layout import ShardRange
from secondcast.storage_schemas.writer import CacheWriter

_Event = tuple[int, dict[str, Any] | None]


def devices_of(device: torch.device, workers: int) -> list[str]:
    """The device of each worker: the GPUs in turn, unless one was named."""
    if device.type != "cuda" or device.index is not None:
        return [str(device)] * workers
    return [f"cuda:{number % torch.cuda.device_count()}" for number in range(workers)]


@dataclass(frozen=True, kw_only=True)
class LocalWorkers:
    """Several processes on this machine, a GPU each. threads: of each; None: the CPUs, divided among them."""

    count: int
    config: WorkerConfig
    threads: int | None = None
    compute_here: ClassVar[bool] = True

    def build_shards(
        self, cache: CacheWriter, teacher: TeacherFolder, device: torch.device | None, progress: Progress
    ) -> dict[str, PeakMemory]:
        """See Workers; no more processes are started than can have a shard of their own."""
        assert device is not None  # build() has refused it
        count = min(self.count, most_workers(cache, self.config.stage))
        if count < self.count:
            progress.say(f"{counted(count, 'worker')} instead of {self.count}: more would have no shard to make")
        devices = devices_of(device, count)
        if device.type == "cuda" and len(set(devices)) < count:
            shared = f"{counted(count, 'worker')} share {counted(len(set(devices)), 'GPU')}"
            if self.config.memory.max_gpu_memory == AUTO:
                raise SettingsError(
                    f"{shared}, and --max-gpu-memory is auto, which would give each of them all free memory: give a "
                    f"size per worker, or fewer --workers"
                )
            progress.say(f"{shared}: each holds its own transformer")
        job = Job.of(cache, teacher, self.config, self.threads or max(1, _usable_cpus() // count))
        return run_local_workers(cache, job, devices, progress)


def _usable_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def run_local_workers(
    writer: CacheWriter, job: Job, devices: Sequence[str], progress: Progress
) -> dict[str, PeakMemory]:
    """Run one worker per device, those that have no shard to make left out; the largest peaks of one, by stage.

    Raises WorkerFailedError with the first failure's own message, after the others have committed what they had in
    hand.
    """
    workers = _Workers(job, len(devices), dict(zip(_busy(writer, job, len(devices)), devices, strict=False)))
    try:
        with _Bars(writer, progress, len(devices)) as bars:
            peaks = workers.run(bars)
    except BaseException:
        workers.stop()
        raise
    return peaks


def most_workers(writer: CacheWriter, stage: Stage) -> int:
    """How many workers can have a shard of their own in some stage: more would have nothing to do, ever."""
    return max(len(_shards(writer, kind)) for kind in _kinds(stage))


def _busy(writer: CacheWriter, job: Job, count: int) -> list[int]:
    """Numbers of the workers that own a missing shard."""
    missing = [shard for kind in _kinds(job.config.stage) for shard in writer.missing(kind)]
    return [number for number in range(count) if Worker(number=number, count=count).owned(missing)]


def _kinds(stage: Stage) -> tuple[Kind, ...]:
    of_stage: dict[Stage, tuple[Kind, ...]] = {
        "text": ("embeddings",), "sample": ("trajectories",), "all": ("embeddings", "trajectories")
    }  # fmt: skip
    return of_stage[stage]


def _shards(writer: CacheWriter, kind: Kind) -> Sequence[ShardRange]:
    return writer.layout.embeddings if kind == "embeddings" else writer.layout.trajectories


class _Bars:
    """One bar per stage for all workers; behind it what each of them has done."""

    def __init__(self, writer: CacheWriter, progress: Progress, workers: int) -> None:
        self._progress, self._stack = progress, ExitStack()
        self._title = ""
        self._bar: Bar = Silent()
        self._done = [0] * workers
        self._counts: dict[str, dict[str, int]] = {}
        missing = {"text": writer.missing("embeddings"), "sample": writer.missing("trajectories")}
        for title, total in (("text", len(writer.prompts)), ("sample", len(writer.layout))):
            left = sum(shard.rows for shard in missing[title])
            self._counts[title] = {"total": total, "done": total - left}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def say(self, worker: int, message: str) -> None:
        self._progress.say(f"worker {worker}: {message}")

    def advance(self, worker: int, title: str, count: int, note: str) -> None:
        if title == "text" and self._title == "sample":
            # Some workers sample already while others still encode; two bars at once would be a flicker.
            return
        if title != self._title:
            self._begin(title)
        self._done[worker] += count
        each = " ".join(f"{number}:{done}" for number, done in enumerate(self._done))
        self._bar.advance(count, f"by worker {each}" + (f", worker {worker}: {note}" if note else ""))

    def _begin(self, title: str) -> None:
        self._stack.close()
        self._title, self._done = title, [0] * len(self._done)
        unit = "prompts" if title == "text" else "trajectories"
        self._bar = self._stack.enter_context(self._progress.bar(title, unit=unit, **self._counts[title]))


class _Workers:
    def __init__(self, job: Job, count: int, devices: Mapping[int, str]) -> None:
        """devices: of the workers that are started, by their numbers among `count`."""
        self._events: queue.SimpleQueue[_Event] = queue.SimpleQueue()
        self._count = count
        self._processes = {number: self._start(job, number, device) for number, device in devices.items()}

    def _start(self, job: Job, number: int, device: str) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            # -P: a folder `models` where the command is given is not ours.
            [sys.executable, "-P", "-m", "secondcast.cache_builder.workers.process"],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # Ctrl-C reaches the workers through the end of their stdin, once, and not also from the terminal.
            start_new_session=True,
        )
        worker = Worker(number=number, count=self._count)
        config = job.config.model_copy(update={"worker": worker})
        told = job.model_copy(update={"config": config}).json_value() | {"device": device}
        assert process.stdin is not None
        # One that has ended already: its exit code says so.
        with suppress(BrokenPipeError):
            process.stdin.write(json.dumps(told) + "\n")
            process.stdin.flush()
        threading.Thread(target=self._listen, args=(number, process), daemon=True).start()
        return process

    def _listen(self, number: int, process: "subprocess.Popen[str]") -> None:
        assert process.stdout is not None
        try:
            # A worker that is killed in mid-line: its exit code says so.
            with suppress(ValueError):
                for line in process.stdout:
                    self._events.put((number, json.loads(line)))
        finally:
            process.wait()
            self._events.put((number, None))

    def run(self, bars: _Bars) -> dict[str, PeakMemory]:
        """Until all have ended."""
        peaks: list[dict[str, PeakMemory]] = []
        said: dict[int, str] = {}
        running = len(self._processes)
        while running:
            number, event = self._events.get()
            if event is None:
                running -= 1
                self._check_end(number, said.get(number))
            elif event["event"] == "advance":
                bars.advance(number, event["title"], event["count"], event["note"])
            elif event["event"] == "say":
                bars.say(number, event["message"])
            elif event["event"] == "error":
                said[number] = event["message"]
            else:
                peaks.append(_peak_of(event))
        return largest_peaks(peaks)

    def _check_end(self, number: int, message: str | None) -> None:
        code = self._processes[number].returncode
        if code == 0:
            return
        if message is None:
            how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
            hint = " (out of host memory?)" if code == -9 else ""
            message = f"{how}{hint}: what was committed stays; give the same command again"
        raise WorkerFailedError(f"worker {number} of {self._count}: {message}")

    def stop(self) -> None:
        """Have all end: each commits what it has in hand. A second Ctrl-C ends them at once."""
        try:
            for process in self._processes.values():
                assert process.stdin is not None
                with suppress(BrokenPipeError):
                    process.stdin.close()
            for process in self._processes.values():
                process.wait()
        except BaseException:
            for process in self._processes.values():
                process.kill()
            raise


def _peak_of(event: dict[str, Any]) -> dict[str, PeakMemory]:
    return {event["stage"]: PeakMemory(host_bytes=event["host_bytes"], gpu_bytes=event["gpu_bytes"])}

"""A build on a Ray cluster: runs of shards are tasks, an actor holds one GPU's models, Ray restarts what dies.

A thin adapter: which shards are missing is read from the cache, and a shard is committed by the code of any other
worker, so a task that is run twice finds its shards there.
"""

import contextlib
import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any
from urllib.parse import urlsplit

from secondcast.cache_builder.build import Stages
from secondcast.cache_builder.share import Worker
from secondcast.cache_builder.waiting import needed_embeddings, wait_for_embeddings
from secondcast.cache_builder.workers.job import Job
from secondcast.models.device import quiet_libraries, usable_device
from secondcast.models.memory.peak import PeakMemory, largest_peaks
from secondcast.storage_schemas.errors import BadSettings, MissingExtra, SecondcastError, WorkerFailed
from secondcast.storage_schemas.progress import Progress, Silent, counted
from secondcast.storage_schemas.schema.commits import Kind, committed_shards
from secondcast.storage_schemas.schema.layout import ShardRange
from secondcast.storage_schemas.schema.manifest import check_same_teacher
from secondcast.storage_schemas.writer import CacheWriter

_RESTARTS, _RETRIES = 20, 5
_TASKS_PER_WORKER, _MOST_SHARDS = 4, 8
_CONNECT_SECONDS = 10.0
_POLL_SECONDS = 1.0
_PLACE_SECONDS = 60.0


class Builder:
    """One worker: made into an actor by Ray, with a GPU of its own where the cluster has any."""

    def __init__(self, job: str) -> None:
        """`job`: a Job as JSON. Nothing can fail here: Ray would try it again, and not say why it failed."""
        self._job = Job.model_validate_json(job)

    def ready(self) -> None:
        """Answers once Ray has found a place."""

    def make(self, kind: Kind, numbers: list[int]) -> dict[str, PeakMemory]:
        """Commit those of these shards that are not committed yet; the peaks of this process so far, by stage."""
        writer, stages = self._opened
        layout, there = writer.layout, committed_shards(writer.folder, kind)
        shards = layout.embeddings if kind == "embeddings" else layout.trajectories
        if missing := [shards[number] for number in numbers if number not in there]:
            stages.make(kind, missing)
        return dict(stages.peaks)

    @cached_property
    def _opened(self) -> tuple[CacheWriter, Stages]:
        quiet_libraries()
        self._job.begin()
        writer = self._job.writer()
        recorded = writer.manifest.teacher
        teacher = self._job.find_teacher(recorded.pooled)
        # On another machine other weights may lie under the same name.
        found = teacher.identity(text_length=recorded.text_length, pooled=recorded.pooled)
        check_same_teacher(writer.manifest, found, f"{writer.folder} (on {socket.gethostname()})")
        # Ray shows an actor its own GPU alone, or none.
        return writer, Stages(writer, teacher, self._job.share, usable_device("auto"), Silent())


def run_on_ray(
    address: str, writer: CacheWriter, job: Job, *, workers: int | None, progress: Progress
) -> dict[str, PeakMemory]:
    """Build what is missing on a cluster; the largest peaks of one worker, by stage.

    address: "local" (a cluster of this machine, for this build), "auto" (one that runs here), "host:port", or
    "ray://host:port". workers: actors, by default as many as there are GPUs (or, without any, CPUs by `job.threads`).
    """
    ray = _ray()
    with _connected(ray, address):
        crew = _Crew(ray, job, workers, progress)
        try:
            if job.share.stage != "sample":
                crew.run(writer, "embeddings")
            if job.share.stage != "text":
                shards = writer.missing("trajectories")
                wait_for_embeddings(
                    writer,
                    needed_embeddings(writer, shards),
                    Worker(),
                    wait_seconds=job.share.wait_seconds if job.share.stage == "sample" else 0,
                    progress=progress,
                )
                crew.run(writer, "trajectories")
            return largest_peaks(crew.peaks)
        finally:
            crew.dismiss()


class _Crew:
    def __init__(self, ray: Any, job: Job, workers: int | None, progress: Progress) -> None:
        self._ray, self._progress = ray, progress
        self.peaks: list[dict[str, PeakMemory]] = []
        resources = ray.cluster_resources()
        gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 0))
        threads = job.threads or 1
        count = workers or gpus or max(1, cpus // threads)
        if gpus:
            options: dict[str, Any] = {"num_gpus": 1, "num_cpus": min(threads, max(1, cpus // gpus))}
        else:
            options = {"num_cpus": threads}
            job = job.model_copy(update={"threads": threads})
        _check_room(count, options, gpus, cpus)
        actor = ray.remote(max_restarts=_RESTARTS, max_task_retries=_RETRIES, **options)(Builder)
        self._actors = [actor.remote(job.model_dump_json()) for _ in range(count)]
        progress.say(f"{counted(count, 'worker')} on Ray, {'a GPU' if gpus else counted(threads, 'CPU thread')} each")
        begun, waiting = ray.wait(
            [actor.ready.remote() for actor in self._actors], num_returns=count, timeout=_PLACE_SECONDS
        )
        if waiting:
            progress.say(f"{len(begun)} of them have a place on the cluster; the others wait until something else ends")

    def run(self, writer: CacheWriter, kind: Kind) -> None:
        """Have every missing shard of a kind committed."""
        title, unit = ("text", "prompts") if kind == "embeddings" else ("sample", "trajectories")
        shards = writer.missing(kind)
        if not shards:
            return
        total = len(writer.prompts) if kind == "embeddings" else len(writer.layout)
        rows = {shard.shard: shard.rows for shard in shards}
        left = sum(rows.values())
        with self._progress.bar(title, total=total, done=total - left, unit=unit) as bar:
            for new in self._committed(writer, kind, shards):
                bar.advance(sum(rows[number] for number in new))

    def _committed(self, writer: CacheWriter, kind: Kind, shards: Sequence[ShardRange]) -> Iterator[set[int]]:
        """Numbers of shards as they are committed."""
        ray, numbers = self._ray, [shard.shard for shard in shards]
        runs = iter(_runs(numbers, len(self._actors)))
        working = {actor.make.remote(kind, run): actor for actor, run in zip(self._actors, runs, strict=False)}
        seen = committed_shards(writer.folder, kind)
        while working:
            done, _ = ray.wait(list(working), timeout=_POLL_SECONDS)
            for task in done:
                actor = working.pop(task)
                self.peaks.append(_result_of(ray, task))
                if (run := next(runs, None)) is not None:
                    working[actor.make.remote(kind, run)] = actor
            there = committed_shards(writer.folder, kind)
            yield (there - seen) & set(numbers)
            seen = there

    def dismiss(self) -> None:
        """End all actors."""
        for actor in self._actors:
            with contextlib.suppress(Exception):
                self._ray.kill(actor, no_restart=True)


def _runs(numbers: list[int], workers: int) -> list[list[int]]:
    """Shards in runs of a task: several, so that writing one goes on beside sampling the next, yet small ones."""
    size = min(_MOST_SHARDS, max(1, len(numbers) // (_TASKS_PER_WORKER * workers)))
    return [numbers[i : i + size] for i in range(0, len(numbers), size)]


def _check_room(count: int, options: dict[str, Any], gpus: int, cpus: int) -> None:
    room = gpus if gpus else cpus // options["num_cpus"]
    if count > room:
        what = (
            counted(gpus, "GPU")
            if gpus
            else f"{counted(cpus, 'CPU')} at {counted(options['num_cpus'], 'thread')} a worker"
        )
        raise BadSettings(
            f"--workers is {count}, the Ray cluster has room for {room} ({what}): give --workers {max(1, room)}"
            + ("" if gpus else ", or fewer --threads")
        )


def _result_of(ray: Any, task: Any) -> Any:
    """What a task gives; or the error that it ended with, in its own words."""
    try:
        return ray.get(task)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, SecondcastError | OSError):
            raise WorkerFailed(f"a worker on Ray: {cause}") from error
        if type(cause).__name__ == "OutOfMemoryError":
            raise WorkerFailed(
                "a worker on Ray: the GPU is out of memory: lower --batch-size; what was committed stays"
            ) from error
        raise
    except ray.exceptions.RayError as error:
        reason = str(error).strip().splitlines()[0]
        raise WorkerFailed(
            f"a worker on Ray died {_RETRIES + 1} times over the same shards ({reason}): out of host memory? what was "
            f"committed stays; give the same command again"
        ) from error


def _ray() -> Any:
    # Ray reports its use to its makers unless it is told not to.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise MissingExtra("--ray was given and ray is not installed: pip install 'secondcast[ray]'") from error
    return ray


@contextmanager
def _connected(ray: Any, address: str) -> Iterator[None]:
    """A connection to a cluster; BadSettings if there is none."""
    quiet = {"logging_level": "ERROR", "log_to_driver": False}
    try:
        if address == "local":
            ray.init(address="local", include_dashboard=False, **quiet)
        else:
            _check_reachable(address)
            ray.init(address=address, **quiet)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise BadSettings(
            f"--ray {address}: no cluster answers there ({reason}): start one with `ray start --head`, and give "
            f"`auto` on one of its machines, host:port, or `local` for this machine alone; one that asks for a token "
            f"takes it from RAY_AUTH_TOKEN (with RAY_AUTH_MODE=token)"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Ray itself tries a dead address for minutes and then ends the process; OSError or ValueError."""
    if address == "auto":
        return
    parts = urlsplit(address if "//" in address else f"//{address}")
    if parts.hostname is None or parts.port is None:
        raise ValueError("expected local, auto, host:port or ray://host:port")
    deadline = time.monotonic() + _CONNECT_SECONDS
    with socket.create_connection((parts.hostname, parts.port), timeout=max(0.1, deadline - time.monotonic())):
        pass

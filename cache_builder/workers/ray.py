"""A build on a Ray cluster: runs of shards are tasks, an actor holds one GPU's models, Ray restarts what dies.

A thin adapter: which shards are missing is read from the cache, and a shard is committed by the code of any other
worker, so a task that is run twice finds its shards there. As many actors are asked for as the build was given:
those that have no place wait for one, which is how a cluster that grows learns what is wanted.
"""

import contextlib
import socket
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch

from secondcast.cache_builder.shard_builder import ShardBuilder
from secondcast.cache_builder.waiting import needed_embeddings, wait_for_embeddings
from secondcast.cache_builder.worker import Worker, WorkerConfig
from secondcast.cache_builder.workers.job import Job
from secondcast.cache_builder.workers.ray_cluster import ClusterResources, RayDevice, connected, read_runtime_env
from secondcast.cache_builder.workers.shard_queue import Run, ShardQueue
from secondcast.models.device import quiet_libraries, usable_device
from secondcast.models.memory.peak import PeakMemory, largest_peaks
from secondcast.models.teacher.folder import TeacherFolder
from secondcast.storage_schemas.errors import SecondcastError, WorkerFailedError, reason
from secondcast.storage_schemas.progress import Bar, Progress, Silent, counted
from secondcast.storage_schemas.schema.commits import Kind, committed_shards
from secondcast.storage_schemas.schema.comparing import check_same_teacher
from secondcast.storage_schemas.writer import CacheWriter

_RESTARTS, _RETRIES = 20, 5
_POLL_SECONDS = 1.0
_PLACE_SECONDS = 60.0


class Builder:
    """One worker: made into an actor by Ray, with a GPU of its own where workers ask for one."""

    def __init__(self, job: str, device: str) -> None:
        """`job`: a Job as JSON. Nothing can fail here: Ray would try it again, and not say why it failed."""
        self._job, self._device = Job.model_validate_json(job), device

    def ready(self) -> None:
        """Answers once Ray has found a place."""

    def make(self, kind: Kind, numbers: Run) -> dict[str, PeakMemory]:
        """Commit those of these shards that are not committed yet; the peaks of this process so far, by stage."""
        writer, builder = self._opened
        layout, there = writer.layout, committed_shards(writer.folder, kind)
        shards = layout.embeddings if kind == "embeddings" else layout.trajectories
        missing = [shards[number] for number in numbers if number not in there]
        if kind == "embeddings":
            builder.encode(missing)
        else:
            builder.sample(missing)
        return dict(builder.peaks)

    @cached_property
    def _opened(self) -> tuple[CacheWriter, ShardBuilder]:
        quiet_libraries()
        self._job.begin()
        writer = self._job.writer()
        recorded = writer.manifest.teacher
        teacher = self._job.find_teacher(recorded.pooled)
        # On another machine other weights may lie under the same name.
        found = teacher.identity(text_length=recorded.text_length, pooled=recorded.pooled)
        check_same_teacher(writer.manifest, found, f"{writer.folder} (on {socket.gethostname()})")
        # Ray shows an actor its own GPU alone; one whose driver does not work is an error, not a worker on the CPU.
        return writer, ShardBuilder(writer, teacher, self._job.config, usable_device(self._device), Silent())


@dataclass(frozen=True, kw_only=True)
class RayWorkers:
    """Workers on a Ray cluster. See run_on_ray."""

    address: str
    config: WorkerConfig
    device: RayDevice = "auto"
    count: int | None = None
    threads: int | None = None
    runtime_env: Path | None = None
    compute_here: ClassVar[bool] = False

    def build_shards(
        self, cache: CacheWriter, teacher: TeacherFolder, device: torch.device | None, progress: Progress
    ) -> dict[str, PeakMemory]:
        """See Workers; the device is that of each actor."""
        return run_on_ray(
            self.address,
            cache,
            Job.of(cache, teacher, self.config, self.threads),
            device=self.device,
            workers=self.count,
            progress=progress,
            runtime_env=self.runtime_env,
        )


def run_on_ray(
    address: str,
    writer: CacheWriter,
    job: Job,
    *,
    device: RayDevice,
    workers: int | None,
    progress: Progress,
    runtime_env: Path | None = None,
) -> dict[str, PeakMemory]:
    """Build what is missing on a cluster; the largest peaks of one worker, by stage.

    address: "local" (a cluster of this machine, for this build), "auto" (one that runs here), "host:port", or
    "ray://host:port". device: "cuda" asks for a GPU per worker, and waits for it; "auto" is that where the cluster has
    any. workers: actors, by default as many as have a place now, and at least one. runtime_env: a file for
    `read_runtime_env`.
    """
    environment = None if runtime_env is None else read_runtime_env(runtime_env)
    with connected(address, environment) as ray:
        resources = ClusterResources.of(ray.cluster_resources(), address, device, job.threads)
        actors = _Actors(ray, job, resources, workers or max(1, resources.places), progress)
        try:
            if job.config.stage != "sample":
                actors.run(writer, "embeddings")
            if job.config.stage != "text":
                shards = writer.missing("trajectories")
                wait_for_embeddings(
                    writer,
                    needed_embeddings(writer, shards),
                    Worker(),
                    wait_seconds=job.config.wait_seconds if job.config.stage == "sample" else 0,
                    progress=progress,
                )
                actors.run(writer, "trajectories")
            return largest_peaks(actors.peaks)
        finally:
            actors.dismiss()


class _Actors:
    """The actors of a build. Those that have no place yet take part as soon as they have one."""

    def __init__(self, ray: Any, job: Job, resources: ClusterResources, count: int, progress: Progress) -> None:
        self._ray, self._progress, self._resources = ray, progress, resources
        self.peaks: list[dict[str, PeakMemory]] = []
        if resources.device == "cpu":
            job = job.model_copy(update={"threads": resources.threads})
        actor = ray.remote(max_restarts=_RESTARTS, max_task_retries=_RETRIES, **resources.options)(Builder)
        self._actors = [actor.remote(job.model_dump_json(), resources.device) for _ in range(count)]
        self._starting = {worker.ready.remote(): number for number, worker in enumerate(self._actors)}
        self._working: dict[Any, tuple[int, Run]] = {}
        self._idle: set[int] = set()
        self._said, self._begun = False, time.monotonic()
        progress.say(f"{counted(count, 'worker')} on Ray, {resources.asked} each")

    def run(self, writer: CacheWriter, kind: Kind) -> None:
        """Commit every missing shard of a kind; WorkerFailedError with the first error, after all others."""
        title, unit = ("text", "prompts") if kind == "embeddings" else ("sample", "trajectories")
        shards = writer.missing(kind)
        if not shards:
            return
        total = len(writer.prompts) if kind == "embeddings" else len(writer.layout)
        rows = {shard.shard: shard.rows for shard in shards}
        queue = ShardQueue(list(rows), len(self._actors))
        with self._progress.bar(title, total=total, done=total - sum(rows.values()), unit=unit) as bar:
            self._work(queue, kind, rows, bar)
        if queue.unmade:
            self._fail(queue)

    def _work(self, queue: ShardQueue, kind: Kind, rows: dict[int, int], bar: Bar) -> None:
        while True:
            for number in sorted(self._idle):
                if (run := queue.take(number)) is not None:
                    self._idle.discard(number)
                    self._working[self._actors[number].make.remote(kind, run)] = number, run
            # Who has no place yet is waited for only while something is left to do for it.
            waited = [*self._working, *(self._starting if len(queue) else ())]
            if not waited:
                return
            done, _ = self._ray.wait(waited, timeout=_POLL_SECONDS)
            for task in done:
                if task in self._starting:
                    self._placed(queue, task)
                else:
                    self._ended(queue, task, rows, bar)
            self._say_who_waits()

    def _placed(self, queue: ShardQueue, task: Any) -> None:
        number = self._starting.pop(task)
        try:
            self._ray.get(task)
        except self._ray.exceptions.RayError as error:
            queue.retire(number, error)
            self._progress.say(f"worker {number} on Ray could not be started: {reason(error)}")
        self._idle.add(number)

    def _ended(self, queue: ShardQueue, task: Any, rows: dict[int, int], bar: Bar) -> None:
        number, run = self._working.pop(task)
        self._idle.add(number)
        try:
            self.peaks.append(self._ray.get(task))
        except self._ray.exceptions.RayError as error:
            queue.failed(number, run, error)
            self._progress.say(f"worker {number} on Ray failed, the others continue: {reason(_cause(error))}")
            return
        queue.made(number)
        bar.advance(sum(rows[shard] for shard in run), counted(len(self._working) + 1, "worker"))

    def _say_who_waits(self) -> None:
        if self._said or not self._starting or time.monotonic() - self._begun < _PLACE_SECONDS:
            return
        self._said = True
        count, resources = len(self._actors), self._resources
        self._progress.say(
            f"{count - len(self._starting)} of {count} workers are scheduled on the cluster, which had "
            f"{resources.gpus} GPUs and {resources.cpus} CPUs; the others wait until it grows or something else ends, "
            f"each for {resources.asked}"
        )

    def _fail(self, queue: ShardQueue) -> None:
        error = queue.given_up[0].error if queue.given_up else queue.last_error
        assert error is not None
        cause = _cause(error)
        left = len(queue.unmade)
        kept = f"{counted(left, 'shard')} {'is' if left == 1 else 'are'} left, what was committed stays"
        if isinstance(cause, SecondcastError | OSError):
            raise WorkerFailedError(f"a worker on Ray: {cause}; {kept}") from error
        if type(cause).__name__ == "OutOfMemoryError":
            raise WorkerFailedError(f"a worker on Ray: the GPU is out of memory: lower --batch-size; {kept}") from error
        if cause is not error:
            raise error
        raise WorkerFailedError(
            f"a Ray worker failed repeatedly on the same shards ({reason(error)}): out of host memory? "
            f"{kept}; give the same command again"
        ) from error

    def dismiss(self) -> None:
        """End all actors."""
        for actor in self._actors:
            with contextlib.suppress(Exception):
                self._ray.kill(actor, no_restart=True)


def _cause(error: Exception) -> Exception:
    """What a task raised; the error itself where Ray lost the worker."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, Exception) else error

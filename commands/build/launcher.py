"""Where a build runs: in this process, in several local workers, in one of several launched ones, or on Ray."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self, cast

from pydantic import Field, model_validator

from secondcast.cache_builder.worker import Stage
from secondcast.commands.shell.resolve import launched_device
from secondcast.storage_schemas.errors import SettingsError
from secondcast.storage_schemas.progress import counted
from secondcast.storage_schemas.schema.flags import Flags, Shown

if TYPE_CHECKING:
    from secondcast.cache_builder.build import BuildResult, WorkerConfig
    from secondcast.cache_builder.settings import BuildSettings
    from secondcast.cache_builder.worker import Launched
    from secondcast.cache_builder.workers.ray_cluster import RayDevice
    from secondcast.models.teacher.folder import TeacherFolder

WAIT_SECONDS = 1800.0
"""How long one of several workers waits for embeddings of the others before it gives up if no new one appears."""


_WORKERS = "Workers"


class BuildLauncher(Flags):
    """The options of `build` that distribute the work; none of them changes the contents of the cache."""

    stage: Annotated[Stage, Shown(group=_WORKERS)] = Field(
        default="all",
        description="Stage to run: all, text (embeddings only), or sample (trajectories, from existing embeddings).",
    )
    workers: Annotated[int | None, Shown(group=_WORKERS)] = Field(
        default=None, ge=1, description="Number of processes on this machine, one per GPU."
    )
    worker: Annotated[str | None, Shown(group=_WORKERS, metavar="I/N")] = Field(
        default=None, description="Build only the shards I, I + N, ... in this process; I starts at 0."
    )
    embeddings_timeout: Annotated[float | None, Shown(group=_WORKERS)] = Field(
        default=None,
        ge=0,
        description=f"Seconds to wait for embeddings of other workers. Default: {WAIT_SECONDS:g} with several workers.",
    )
    ray: Annotated[str | None, Shown(group=_WORKERS, metavar="ADDRESS")] = Field(
        default=None,
        description="Ray cluster to build on: local, auto, host:port or ray://host:port. --device cuda waits for GPUs.",
    )
    ray_runtime_env: Annotated[Path | None, Shown(group=_WORKERS, metavar="FILE")] = Field(
        default=None, description="YAML or JSON file with Ray's runtime environment for the workers."
    )
    threads: Annotated[int | None, Shown(group=_WORKERS)] = Field(
        default=None, ge=1, description="Number of CPU threads per worker."
    )

    @model_validator(mode="after")
    def _one_way_to_start(self) -> Self:
        if self.worker is not None and (self.workers is not None or self.ray is not None):
            other = "--workers" if self.workers is not None else "--ray"
            raise ValueError(
                f"--worker {self.worker} and {other} cannot be combined: --worker is for processes that you start "
                f"yourself, {other} starts them; give one of the two"
            )
        if self.ray is None and self.ray_runtime_env is not None:
            raise ValueError(f"--ray-runtime-env {self.ray_runtime_env} only applies to workers on Ray: give --ray too")
        return self

    def check_alone(self, flag: str) -> None:
        """Raise SettingsError unless this process runs all stages alone."""
        if self.stage != "all" or self.workers is not None or self.ray is not None or self._launched().by:
            raise SettingsError(
                f"{flag} measures one process that runs both stages: remove --stage, --workers, --worker and --ray "
                f"(and run it without torchrun and srun)"
            )

    def own_device(self, name: str) -> Any:
        """The device of this process; with torchrun or Slurm, the one of its local rank."""
        if self.ray is not None and name not in ("auto", "cuda", "cpu"):
            raise SettingsError(
                f"--device {name} and --ray cannot be combined: Ray assigns a GPU to each worker; give --device cuda, "
                f"cpu, or auto for GPUs if the cluster has any"
            )
        import torch

        if self.threads is not None:
            torch.set_num_threads(self.threads)
        # The driver of a build on Ray needs no GPU.
        return launched_device("cpu" if self.ray is not None else name, self._launched().local_number)

    def build(
        self,
        location: str,
        settings: "BuildSettings",
        teacher: "TeacherFolder",
        device: Any,
        progress: Any,
        device_name: str = "auto",
    ) -> "BuildResult":
        """Start or resume a build.

        device_name: the value of --device, for workers on Ray.
        """
        from secondcast.cache_builder.build import build

        launched, alone = self._launched(), (self.workers or 1) == 1 and self.ray is None
        if launched.by:
            progress.say(f"{launched.worker} (by {launched.by})")
        if alone:
            share = self._share(settings, launched)
            return build(location, settings, teacher, device, progress, share)
        return self._build_by_others(location, settings, teacher, device, progress, device_name)

    def _build_by_others(
        self,
        location: str,
        settings: "BuildSettings",
        teacher: "TeacherFolder",
        device: Any,
        progress: Any,
        device_name: str,
    ) -> "BuildResult":
        from secondcast.cache_builder.build import check_device, open_writer, result_of, say_what_changed
        from secondcast.cache_builder.workers.job import Job
        from secondcast.cache_builder.workers.local import devices_of, most_workers, run_local_workers
        from secondcast.storage_schemas.io.folders import location_of

        if self.ray is None:
            check_device(settings, teacher, device)
        writer = open_writer(location, settings, teacher, progress)
        if self.ray is None:
            say_what_changed(writer, settings, device, progress)
        requested = self.workers or 1
        workers = min(requested, most_workers(writer, self.stage)) if self.ray is None else requested
        if workers < requested:
            progress.say(f"{counted(workers, 'worker')} instead of {requested}: there is no shard for more")
        job = Job(
            location=location_of(writer.folder),
            teacher=teacher.pinned_source,
            teacher_path=str(teacher.path.resolve()),
            share=self._share(settings, None),
            threads=self.threads or self._threads_each(workers),
        )
        if self.ray is not None:
            from secondcast.cache_builder.workers.ray import run_on_ray

            peaks = run_on_ray(
                self.ray,
                writer,
                job,
                device=cast("RayDevice", device_name),
                workers=self.workers,
                progress=progress,
                runtime_env=self.ray_runtime_env,
            )
        else:
            devices = devices_of(device, workers)
            if device.type == "cuda" and len(set(devices)) < len(devices):
                progress.say(
                    f"{counted(len(devices), 'worker')} share {counted(len(set(devices)), 'GPU')}: each loads the "
                    f"whole transformer"
                )
            peaks = run_local_workers(writer, job, devices, progress)
        return result_of(writer, peaks)

    def _threads_each(self, workers: int) -> int | None:
        """Threads of each local worker: the usable CPUs, divided evenly among the workers."""
        if self.workers is None:
            return None
        usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
        return max(1, usable // workers)

    def _launched(self) -> "Launched":
        from secondcast.cache_builder.worker import Launched, Worker, launched_worker

        if self.workers is not None or self.ray is not None:
            return Launched(worker=Worker(), by="", local_number=None)
        return launched_worker(self.worker, os.environ)

    def _share(self, settings: "BuildSettings", launched: "Launched | None") -> "WorkerConfig":
        from secondcast.cache_builder.build import WorkerConfig
        from secondcast.cache_builder.worker import Worker

        worker = launched.worker if launched is not None else Worker()
        # Local workers that only sample wait for no other worker, unless --embeddings-timeout is given.
        several = self.stage != "sample" if launched is None else worker.count > 1
        wait_seconds = (
            self.embeddings_timeout if self.embeddings_timeout is not None else (WAIT_SECONDS if several else 0.0)
        )
        return WorkerConfig(
            stage=self.stage,
            worker=worker,
            wait_seconds=wait_seconds,
            batch_size=settings.batch_size,
            attention_backend=settings.attention_backend,
        )

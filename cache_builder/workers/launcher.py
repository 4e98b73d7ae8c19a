"""Where a build runs: in this process, in several local workers, in one of several launched ones, or on Ray."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self, cast

from pydantic import Field, model_validator

from secondcast.cache_builder.worker import Stage
from secondcast.storage_schemas.errors import SettingsError
from secondcast.storage_schemas.schema.flags import Flag, Flags

if TYPE_CHECKING:
    from secondcast.cache_builder.build import BuildResult, Workers
    from secondcast.cache_builder.settings import BuildSettings
    from secondcast.cache_builder.worker import Launched, WorkerConfig
    from secondcast.cache_builder.workers.ray_cluster import RayDevice
    from secondcast.models.teacher.folder import TeacherFolder

WAIT_SECONDS = 1800.0
"""How long one of several workers waits for embeddings of the others before it gives up if no new one appears."""


_WORKERS = "Workers"


class BuildLauncher(Flags):
    """The options of `build` that distribute the work; none of them changes the contents of the cache."""

    stage: Annotated[Stage, Flag(group=_WORKERS)] = Field(
        default="all",
        description="Stage to run: all, text (embeddings only), or sample (trajectories, from existing embeddings).",
    )
    workers: Annotated[int | None, Flag(group=_WORKERS)] = Field(
        default=None, ge=1, description="Number of processes on this machine, one per GPU."
    )
    worker: Annotated[str | None, Flag(group=_WORKERS, metavar="I/N")] = Field(
        default=None, description="Build only the shards I, I + N, ... in this process; I starts at 0."
    )
    embeddings_timeout: Annotated[float | None, Flag(group=_WORKERS)] = Field(
        default=None,
        ge=0,
        description=f"Seconds to wait for embeddings of other workers. Default: {WAIT_SECONDS:g} with several workers.",
    )
    ray: Annotated[str | None, Flag(group=_WORKERS, metavar="ADDRESS")] = Field(
        default=None,
        description="Ray cluster to build on: local, auto, host:port or ray://host:port. --device cuda waits for GPUs.",
    )
    ray_runtime_env: Annotated[Path | None, Flag(group=_WORKERS, metavar="FILE")] = Field(
        default=None, description="YAML or JSON file with Ray's runtime environment for the workers."
    )
    threads: Annotated[int | None, Flag(group=_WORKERS)] = Field(
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

        from secondcast.models.device import launched_device

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
        """Build or resume a cache. device_name: as given to --device, for workers on Ray."""
        from secondcast.cache_builder.build import build

        launched = self._launched()
        if launched.by:
            progress.say(f"{launched.worker} (by {launched.by})")
        workers = self._workers(settings, launched, device_name)
        return build(location, settings, teacher, None if self.ray is not None else device, progress, workers)

    def _workers(self, settings: "BuildSettings", launched: "Launched", device_name: str) -> "Workers":
        config = self._config(settings, launched)
        if self.ray is not None:
            from secondcast.cache_builder.workers.ray import RayWorkers

            return RayWorkers(
                address=self.ray,
                config=config,
                device=cast("RayDevice", device_name),
                count=self.workers,
                threads=self.threads,
                runtime_env=self.ray_runtime_env,
            )
        if (self.workers or 1) > 1:
            from secondcast.cache_builder.workers.local import LocalWorkers

            return LocalWorkers(count=self.workers or 1, config=config, threads=self.threads)
        from secondcast.cache_builder.build import OneProcess

        return OneProcess(config)

    def _launched(self) -> "Launched":
        from secondcast.cache_builder.worker import Launched, Worker, launched_worker

        if self.workers is not None or self.ray is not None:
            return Launched(worker=Worker(), by="", local_number=None)
        return launched_worker(self.worker, os.environ)

    def _config(self, settings: "BuildSettings", launched: "Launched") -> "WorkerConfig":
        from secondcast.cache_builder.worker import WorkerConfig

        # Processes that this one starts, and that only sample, wait for nobody unless --embeddings-timeout is given.
        starts_others = self.ray is not None or (self.workers or 1) > 1
        several = self.stage != "sample" if starts_others else launched.worker.count > 1
        timeout = self.embeddings_timeout
        return WorkerConfig.of(
            settings,
            stage=self.stage,
            worker=launched.worker,
            wait_seconds=timeout if timeout is not None else (WAIT_SECONDS if several else 0.0),
        )

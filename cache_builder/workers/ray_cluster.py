"""A connection to a Ray cluster, and what each worker asks of it."""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import urlsplit

from secondcast.storage_schemas.errors import MissingExtraError, SettingsError, reason

RayDevice = Literal["auto", "cuda", "cpu"]

_CONNECT_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True)
class ClusterResources:
    """What one worker asks of the cluster, and what the cluster has at this moment."""

    device: Literal["cuda", "cpu"]
    threads: int
    gpus: int
    cpus: int

    @classmethod
    def of(cls, resources: dict[str, float], address: str, device: RayDevice, threads: int | None) -> Self:
        """Where workers compute. SettingsError where "auto" finds no GPU: the teacher is never put on CPUs unasked."""
        gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 0))
        if device == "auto" and not gpus:
            # A cluster of this machine for this build does not grow.
            waiting = "" if address == "local" else "--device cuda to wait until it has one, or "
            raise SettingsError(
                f"--ray {address}: the cluster has no GPU at this moment ({cpus} CPUs): give {waiting}--device cpu to "
                f"build on CPUs"
            )
        found = cls(device="cpu" if device == "cpu" else "cuda", threads=threads or 1, gpus=gpus, cpus=cpus)
        if address == "local" and found.places == 0:
            raise SettingsError(
                f"--ray local: a worker asks for {found.asked}, this machine has {gpus} GPUs and {cpus} CPUs: give "
                f"{'--device cpu' if found.device == 'cuda' and not gpus else f'--threads {cpus}'}"
            )
        return found

    @property
    def places(self) -> int:
        """Workers that have room at this moment."""
        by_cpus = self.cpus // self.threads
        return by_cpus if self.device == "cpu" else min(self.gpus, by_cpus)

    @property
    def asked(self) -> str:
        """What a worker asks for, in words."""
        gpu = "a GPU and " if self.device == "cuda" else ""
        return f"{gpu}{self.threads} CPU{'' if self.threads == 1 else 's'}"

    @property
    def options(self) -> dict[str, Any]:
        """The same as options of an actor. An autoscaler starts machines for what has no place."""
        return {"num_cpus": self.threads} | ({"num_gpus": 1} if self.device == "cuda" else {})


def read_runtime_env(path: Path) -> dict[str, Any]:
    """A runtime environment in YAML or JSON, as for `ray job submit --runtime-env`; SettingsError for other files."""
    ray = import_ray()
    import yaml

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
        if not isinstance(found, dict):
            raise ValueError(f"expected keys and values, found {type(found).__name__}")
        ray.runtime_env.RuntimeEnv(**found)
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        why = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise SettingsError(
            f"--ray-runtime-env {path} is no runtime environment ({why}): give a YAML or JSON file with Ray's "
            f"keys, such as working_dir, pip or env_vars"
        ) from error
    return found


def import_ray() -> Any:
    """The module `ray`; MissingExtraError where it is not installed."""
    # Ray reports its use to its makers unless it is told not to.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise MissingExtraError("--ray was given and ray is not installed: pip install 'secondcast[ray]'") from error
    return ray


@contextmanager
def connected(address: str, runtime_env: dict[str, Any] | None) -> Iterator[Any]:
    """The module `ray`, connected to a cluster; SettingsError if there is none."""
    ray = import_ray()
    options: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    if runtime_env is not None:
        options["runtime_env"] = runtime_env
    try:
        if address == "local":
            ray.init(address="local", include_dashboard=False, **options)
        else:
            _check_reachable(address)
            ray.init(address=address, **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise SettingsError(
            f"--ray {address}: no cluster answers there ({reason(error).rstrip('.')}): start one with "
            f"`ray start --head`, and give `auto` on one of its machines, host:port, or `local` for this machine "
            f"alone; one that asks for a token "
            f"takes it from RAY_AUTH_TOKEN (with RAY_AUTH_MODE=token)"
        ) from error
    try:
        yield ray
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

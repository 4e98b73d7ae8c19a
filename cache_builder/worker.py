"""Which shards a worker makes: a function of the shard's number, however the workers were started."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from secondcast.cache_builder.settings import BuildSettings
from secondcast.models.memory.options import SamplingMemory
from secondcast.storage_schemas.errors import SettingsError
from secondcast.storage_schemas.schema.json_files import Record
from secondcast.storage_schemas.schema.layout import ShardRange

Stage = Literal["all", "text", "sample"]

# Launcher, and its variables for: number of the process, number of processes, number within the node.
# Slurm's are those of a step (srun): a batch script without srun has SLURM_NTASKS too, and is one process.
_LAUNCHERS = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    "Slurm": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
}


class Worker(Record):
    """Worker `number` of `count`, from 0: it owns the shards number, number + count, ..."""

    number: int = Field(default=0, ge=0)
    count: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _is_one_of_them(self) -> Self:
        if self.number >= self.count:
            raise ValueError(f"worker {self.number} of {self.count}, expected 0 to {self.count - 1}")
        return self

    def __str__(self) -> str:
        return f"worker {self.number}/{self.count}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """A worker from "i/n"; SettingsError otherwise."""
        number, slash, count = text.partition("/")
        try:
            if not slash:
                raise ValueError
            return cls(number=int(number), count=int(count))
        except (ValueError, ValidationError) as error:
            raise SettingsError(
                f"--worker is {text!r}, expected i/n with i from 0 to n - 1, such as 0/4, 1/4, 2/4 and 3/4 for four "
                f"workers: worker i makes the shards i, i + n, ..."
            ) from error

    def owned(self, shards: Sequence[ShardRange]) -> list[ShardRange]:
        """Those of some shards that this worker makes."""
        return [shard for shard in shards if shard.shard % self.count == self.number]


class WorkerConfig(Record):
    """Which part of a build a worker does, and how; it shapes no byte of the cache but by rounding.

    wait_seconds: how long to wait for embeddings that others make, counted from the last new one.
    """

    stage: Stage = "all"
    worker: Worker = Worker()
    wait_seconds: float = Field(default=0.0, ge=0)
    batch_size: int = Field(ge=1)
    attention_backend: str | None = None
    memory: SamplingMemory = SamplingMemory()

    @classmethod
    def of(cls, settings: BuildSettings, **others: Any) -> Self:
        """The part `others` of a build with these settings."""
        return cls(
            batch_size=settings.batch_size,
            attention_backend=settings.attention_backend,
            memory=settings.memory,
            **others,
        )


@dataclass(frozen=True, kw_only=True)
class Launched:
    """A worker, what launched it ("" for a single process), and its number within its node (None if unknown)."""

    worker: Worker
    by: str
    local_number: int | None


def launched_worker(flag: str | None, environment: Mapping[str, str]) -> Launched:
    """The worker that this process is: by --worker, else by torchrun's or Slurm's variables, else the only one."""
    if flag is not None:
        return Launched(worker=Worker.parse(flag), by="--worker", local_number=None)
    for launcher, names in _LAUNCHERS.items():
        number, count, local = (environment.get(name) for name in names)
        if number is None or count is None or count == "1":
            continue
        try:
            worker = Worker(number=int(number), count=int(count))
            return Launched(worker=worker, by=launcher, local_number=int(local) if local is not None else None)
        except (ValueError, ValidationError) as error:
            raise SettingsError(
                f"{names[0]} is {number!r} and {names[1]} is {count!r} in the environment, expected the number of this "
                f"process and of all, as {launcher} sets them: unset them, or give --worker i/n"
            ) from error
    return Launched(worker=Worker(), by="", local_number=None)

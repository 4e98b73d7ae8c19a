"""The processes that train one student together: each computes an equal part of every batch, the first one writes.

torch's own process group and DistributedDataParallel, which `accelerate` wraps: its state is one per interpreter, and
its prepare() also takes charge of device, autocast and optimizer, which this trainer states itself.
"""

import json
import os
import platform
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from secondcast.models.student.student import Student
from secondcast.storage_schemas.errors import SettingsError, WorkerFailedError
from secondcast.trainer.distributed.sharding import shard

# The longest that one process waits for another before it gives up.
_TIMEOUT = timedelta(minutes=10)
_ADDRESS = ("MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, kw_only=True)
class Distributed:
    """Process `rank` of `ranks`, on its device; of a single one nothing here costs anything.

    sharded: parameters, gradients and moments of the student are divided among the processes, not held by each.
    All but the properties are called by all processes, in the same order.
    """

    rank: int = 0
    ranks: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    sharded: bool = False

    def __post_init__(self) -> None:
        if self.sharded and self.ranks == 1:
            raise SettingsError(
                "--fsdp divides the student among processes, and this is the only one: start several, as in "
                "torchrun --nproc-per-node 2 --no-python secondcast train ..., or leave it out"
            )

    @property
    def is_first(self) -> bool:
        """Whether this process writes and speaks."""
        return self.rank == 0

    def placed(self, student: Student, device: torch.device) -> Student:
        """A student on the device of this process, or its shards there; changed in place."""
        if self.sharded:
            return shard(student, device, self.ranks)
        return student.to(device)

    def synchronized(self, student: Student) -> torch.nn.Module:
        """What to call in training in a student's place, so that its gradients are the mean over the processes."""
        if self.ranks == 1 or self.sharded:
            return student
        return DistributedDataParallel(student, gradient_as_bucket_view=True)

    def part(self, student: torch.nn.Module, *, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of a part of the batch: gradients travel once, with the last one."""
        if isinstance(student, FSDPModule):
            student.set_requires_gradient_sync(last)
        elif isinstance(student, DistributedDataParallel) and not last:
            return student.no_sync()
        return nullcontext()

    def summed(self, values: Sequence[float]) -> list[float]:
        """The sums over the processes of numbers that each has, in fp64."""
        if self.ranks == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def gathered(self, values: Sequence[float]) -> list[float]:
        """The numbers of all processes, as many of each, in the order of the processes."""
        places = [0.0] * (self.ranks * len(values))
        places[self.rank * len(values) : (self.rank + 1) * len(values)] = values
        return self.summed(places)

    def largest(self, values: Sequence[float]) -> list[float]:
        """Of each number the largest that a process has."""
        found = self.gathered(values)
        return [max(found[place :: len(values)]) for place in range(len(values))]

    def on_this_machine(self) -> int:
        """How many of the processes are on the machine of this one, itself among them."""
        name = float(zlib.crc32(platform.node().encode()))
        return self.gathered([name]).count(name)

    def broadcast_from_rank0(self, make: Callable[[], Any]) -> Any:
        """What `make` gives in the first process (a JSON value); if it fails there, all fail."""
        if self.ranks == 1:
            return make()
        failed, told = None, b""
        if self.is_first:
            try:
                told = json.dumps({"value": make()}).encode()
            # Whatever it is: the others wait for what it says.
            except Exception as error:
                failed, told = error, json.dumps({"error": str(error)}).encode()
        found = json.loads(self._broadcast(told))
        if failed is not None:
            raise failed
        if "error" in found:
            raise WorkerFailedError(f"process {self.rank} of {self.ranks} stopped with process 0: {found['error']}")
        return found["value"]

    def _broadcast(self, told: bytes) -> bytes:
        size = torch.tensor([len(told)], device=self.device)
        dist.broadcast(size, src=0)
        data = torch.empty(int(size), dtype=torch.uint8, device=self.device)
        if self.is_first:
            data.copy_(torch.frombuffer(bytearray(told), dtype=torch.uint8))
        dist.broadcast(data, src=0)
        return bytes(data.tolist())


ALONE = Distributed()
"""A process that trains by itself."""


@contextmanager
def init_distributed(
    rank: int,
    ranks: int,
    device: torch.device,
    *,
    sharded: bool = False,
    backend: str | None = None,
) -> Iterator[Distributed]:
    """The processes of a run, met at MASTER_ADDR:MASTER_PORT; left at the end.

    backend: nccl on GPUs, else gloo. SettingsError where they cannot meet. WorkerFailedError in place of torch's errors when
    another process ends; one that hangs is waited for ten minutes.
    """
    processes = Distributed(rank=rank, ranks=ranks, device=device, sharded=sharded)
    if ranks == 1:
        yield processes
        return
    _meet(rank, ranks, device, backend or ("nccl" if device.type == "cuda" else "gloo"))
    try:
        yield processes
    except RuntimeError as error:
        if not _is_of_the_group(error):
            raise
        raise WorkerFailedError(
            f"process {rank} of {ranks} lost the others ({_reason(error)}): one of them ended, its own "
            f"message says why; mend that and give the same command again, it goes on from the last checkpoint"
        ) from error
    # Only where all went well: NCCL would wait for those that are gone.
    dist.destroy_process_group()


def _meet(rank: int, ranks: int, device: torch.device, backend: str) -> None:
    if missing := [name for name in _ADDRESS if name not in os.environ]:
        what = f"{' and '.join(missing)} {'are' if len(missing) > 1 else 'is'} not set"
        raise SettingsError(
            f"{ranks} processes train together, but {what}: they do not know where to meet; start them with torchrun "
            f"or accelerate launch, or set both (the first node's name, a free port)"
        )
    place = ":".join(os.environ[name] for name in _ADDRESS)
    try:
        dist.init_process_group(
            backend,
            init_method="env://",
            rank=rank,
            world_size=ranks,
            timeout=_TIMEOUT,
            device_id=device if device.index is not None else None,
        )
        dist.barrier()
    except (RuntimeError, ValueError) as error:
        raise SettingsError(
            f"process {rank} of {ranks} cannot meet the others at {place} ({_reason(error)}): it takes a "
            f"GPU of its own for each process, or --device cpu, and a free port"
        ) from error


def _is_of_the_group(error: RuntimeError) -> bool:
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(name in text for name in ("gloo", "nccl", "connection"))


def _reason(error: Exception) -> str:
    # Before the first sentence of gloo's and NCCL's errors stands a place in their source, after it advice.
    return re.sub(r"^\[\S+\] ", "", str(error).splitlines()[0]).split(". ")[0]

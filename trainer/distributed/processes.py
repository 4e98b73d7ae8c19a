"""Distributed training of one student: each process computes an equal part of every batch, the first one writes.

Uses torch's process group and DistributedDataParallel directly. `accelerate` wraps them, but its state is global, and
its prepare() also manages device, autocast and optimizer, which this trainer sets itself.
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
from secondcast.storage_schemas.errors import SettingsError, WorkerFailedError, reason
from secondcast.trainer.distributed.sharding import shard

# Timeout for waiting on another process.
_TIMEOUT = timedelta(minutes=10)
_ADDRESS = ("MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, kw_only=True)
class Distributed:
    """Process `rank` of `ranks`, on its device; without cost for a single process.

    sharded: parameters, gradients and moments of the student are sharded across the processes, not replicated.

    All processes call the methods in the same order.
    """

    rank: int = 0
    ranks: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    sharded: bool = False

    def __post_init__(self) -> None:
        if self.sharded and self.ranks == 1:
            raise SettingsError(
                "--fsdp shards the student across processes, but this is the only one: start several, as in "
                "torchrun --nproc-per-node 2 --no-python secondcast train ..., or remove it"
            )

    @property
    def is_main_process(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def placed(self, student: Student, device: torch.device) -> Student:
        """Move a student, or its shards, to the device of this process, in place."""
        if self.sharded:
            return shard(student, device, self.ranks)
        return student.to(device)

    def synchronized(self, student: Student) -> torch.nn.Module:
        """The module to call in training, whose gradients are averaged over the processes."""
        if self.ranks == 1 or self.sharded:
            return student
        # The only buffer, of the negative prompt, is equal in all processes.
        return DistributedDataParallel(student, gradient_as_bucket_view=True, broadcast_buffers=False)

    def part(self, student: torch.nn.Module, *, last: bool) -> AbstractContextManager[None]:
        """A context around forward and backward of a part of the batch: the last part synchronizes gradients."""
        if isinstance(student, FSDPModule):
            student.set_requires_gradient_sync(last)
        elif isinstance(student, DistributedDataParallel) and not last:
            return student.no_sync()
        return nullcontext()

    def summed(self, values: Sequence[float]) -> list[float]:
        """The sums of values over the processes, in fp64."""
        if self.ranks == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def gathered(self, values: Sequence[float]) -> list[float]:
        """The values of all processes, the same number from each, in rank order."""
        places = [0.0] * (self.ranks * len(values))
        places[self.rank * len(values) : (self.rank + 1) * len(values)] = values
        return self.summed(places)

    def largest(self, values: Sequence[float]) -> list[float]:
        """The maximum of each value over the processes."""
        found = self.gathered(values)
        return [max(found[place :: len(values)]) for place in range(len(values))]

    def on_this_machine(self) -> int:
        """Number of processes on this machine, including this one."""
        name = float(zlib.crc32(platform.node().encode()))
        return self.gathered([name]).count(name)

    def broadcast_from_rank0(self, make: Callable[[], Any]) -> Any:
        """The result of `make` in the first process (a JSON value); if it fails there, all processes fail."""
        if self.ranks == 1:
            return make()
        failed, message = None, b""
        if self.is_main_process:
            try:
                message = json.dumps({"value": make()}).encode()
            # Any error: the other processes wait for the message.
            except Exception as error:
                failed, message = error, json.dumps({"error": str(error)}).encode()
        received = json.loads(self._broadcast(message))
        if failed is not None:
            raise failed
        if "error" in received:
            raise WorkerFailedError(f"process {self.rank} of {self.ranks} stopped with process 0: {received['error']}")
        return received["value"]

    def _broadcast(self, message: bytes) -> bytes:
        size = torch.tensor([len(message)], device=self.device)
        dist.broadcast(size, src=0)
        data = torch.empty(int(size), dtype=torch.uint8, device=self.device)
        if self.is_main_process:
            data.copy_(torch.frombuffer(bytearray(message), dtype=torch.uint8))
        dist.broadcast(data, src=0)
        return bytes(data.tolist())


SINGLE_PROCESS = Distributed()
"""A single process."""


@contextmanager
def init_distributed(
    rank: int,
    ranks: int,
    device: torch.device,
    *,
    sharded: bool = False,
    backend: str | None = None,
) -> Iterator[Distributed]:
    """Join the process group of a run at MASTER_ADDR:MASTER_PORT, and leave it at the end.

    backend: default nccl on GPUs, else gloo.

    Raises SettingsError if the processes cannot connect, WorkerFailedError instead of torch's errors if another process
    ends or does not answer for ten minutes.
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
            f"process {rank} of {ranks} lost the connection ({_reason(error)}), because another process ended: fix the "
            f"error that it reports and run the same command again to resume from the last checkpoint"
        ) from error
    # Only after success: NCCL would wait for processes that ended.
    dist.destroy_process_group()


def _meet(rank: int, ranks: int, device: torch.device, backend: str) -> None:
    if missing := [name for name in _ADDRESS if name not in os.environ]:
        unset = f"{' and '.join(missing)} {'are' if len(missing) > 1 else 'is'} not set"
        raise SettingsError(
            f"{ranks} processes train together, but {unset}: start them with torchrun or accelerate launch, or set "
            "both (the name of the first node, a free port)"
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
            f"process {rank} of {ranks} cannot connect to the others at {place} ({_reason(error)}): give each process "
            f"its own GPU, or --device cpu, and use a free port"
        ) from error


def _is_of_the_group(error: RuntimeError) -> bool:
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(name in text for name in ("gloo", "nccl", "connection"))


def _reason(error: Exception) -> str:
    # Errors of gloo and NCCL start with a source location; advice follows the first sentence.
    return re.sub(r"^\[\S+\] ", "", reason(error)).split(". ")[0]

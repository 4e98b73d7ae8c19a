"""Two processes that train together, forked from a test; they meet over gloo."""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable

import pytest
import torch

from secondcast.storage_schemas.errors import SecondcastError
from secondcast.trainer.distributed.processes import Distributed, init_distributed

CPU = torch.device("cpu")
WELL = {0: "", 1: ""}


def forked(body: Callable[[int], str], *, ended: int = 2) -> dict[int, str]:
    """What `body(rank)` says in the `ended` of two processes that can meet (a traceback for a bug)."""
    if torch.cuda.is_available():
        pytest.skip("autograd's threads for GPUs outlive no fork: run with CUDA_VISIBLE_DEVICES= to hide them")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # They inherit the modules of this one: to import torch and transformers takes longer than what is tested.
    context = multiprocessing.get_context("fork")
    said = context.SimpleQueue()

    def one(rank: int) -> None:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        try:
            said.put((rank, body(rank)))
        except BaseException:
            said.put((rank, traceback.format_exc()))
        os._exit(0)

    started = [context.Process(target=one, args=(rank,)) for rank in range(2)]
    for process in started:
        process.start()
    found = dict(said.get() for _ in range(ended))
    for process in started:
        process.join()
    return found


def in_two(target: Callable[[Distributed], None], *, sharded: bool = False, ended: int = 2) -> dict[int, str]:
    """How `target` ends in two processes that train together: "" or its error."""

    def body(rank: int) -> str:
        try:
            with init_distributed(rank, 2, CPU, sharded=sharded) as processes:
                target(processes)
        except SecondcastError as error:
            return f"{type(error).__name__}: {error}"
        return ""

    return forked(body, ended=ended)

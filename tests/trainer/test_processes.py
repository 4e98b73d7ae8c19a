"""Several processes train the student that one would: whatever their number, however it is divided among them."""

import json
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from models.student import checkpoints
from models.teacher_folder import REPLAY_PARTS, find_teacher
from storage_schemas.errors import BadSettings, NonFinite, UnderstudyError, WorkerFailed
from storage_schemas.progress import Silent
from storage_schemas.reader import Cache
from tests.cache_builder.building import build_cache
from trainer.feed import Feed
from trainer.processes import Processes, joined
from trainer.settings import TrainFlags
from trainer.train import train

CPU = torch.device("cpu")
FLAGS = {
    "warmup_steps": 4, "steps": 6, "batch_size": 8, "accumulate": 2, "steps_per_trajectory": 2, "dropout": 0.1,
    "ema": 0.9, "clip": 0.3, "learning_rate": 1e-3, "checkpoint_every": 5, "keep": 9, "validate_rows": 7, "floor": 9,
}  # fmt: skip


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, dev_teacher: Path, t5_config: Path) -> Callable[..., None]:
    """Trains on a cache in fp32: what rounding changes is small there."""
    folder = tmp_path_factory.mktemp("exact")
    things = [f"a {c} {t} {s}\n" for c in ("red", "green") for t in ("dog", "cat", "car") for s in ("up", "down")]
    (folder / "p.txt").write_text("".join(things) + "two dogs 18\n")
    build_cache(folder / "cache", dev_teacher, folder / "p.txt", shard_size=8, batch_size=8, dtype="float32")

    def trained(run: Path, processes: Processes, **changes) -> None:
        settings = TrainFlags.from_flags(student=str(t5_config), **FLAGS | changes).settings()
        caches, teacher = {"cache": Cache.open(folder / "cache")}, find_teacher(str(dev_teacher), REPLAY_PARTS)
        train(
            run, settings, caches, teacher, CPU, Silent(), student_source=str(t5_config), accept_floor=False,
            processes=processes,
        )  # fmt: skip

    return trained


def in_two(target: Callable[[Processes], None], *, sharded: bool = False) -> list[str]:
    """What ends each of two processes that run `target`: "" or the error, as a message (a traceback for a bug)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # They inherit the modules of this one: to import torch and transformers takes longer than what is tested.
    context = multiprocessing.get_context("fork")
    said = context.SimpleQueue()

    def one(rank: int) -> None:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        try:
            with joined(rank, 2, CPU, sharded=sharded) as processes:
                target(processes)
            said.put((rank, ""))
        except UnderstudyError as error:
            said.put((rank, f"{type(error).__name__}: {error}"))
        except BaseException:
            said.put((rank, traceback.format_exc()))
        os._exit(0)

    started = [context.Process(target=one, args=(rank,)) for rank in range(2)]
    for process in started:
        process.start()
    ended = dict(said.get() for _ in started)
    for process in started:
        process.join()
    return [ended[rank] for rank in range(2)]


def furthest(one: Path, other: Path) -> float:
    """How far two checkpoints are apart: the largest distance of a tensor relative to its norm."""
    files = [sorted(path.relative_to(folder) for path in folder.rglob("*.safetensors")) for folder in (one, other)]
    assert files[0] == files[1] and len(files[0]) == 3
    largest = 0.0
    for file in files[0]:
        a, b = load_file(one / file), load_file(other / file)
        assert a.keys() == b.keys()
        largest = max(largest, *(float((a[name] - b[name]).norm() / (a[name].norm() + 1e-12)) for name in a))
    return largest


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]

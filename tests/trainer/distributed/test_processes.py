"""Several processes train the student that one would: whatever their number, however it is divided among them."""

import io
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from secondcast import cli
from secondcast.api import fitting
from secondcast.models.student.folder import checkpoints, student_folder
from secondcast.models.student.student import new_student
from secondcast.models.teacher.folder import REPLAY_PARTS, find_teacher
from secondcast.storage_schemas.errors import SettingsError
from secondcast.storage_schemas.progress import Silent
from secondcast.storage_schemas.reader import Cache
from secondcast.trainer import loop
from secondcast.trainer.cost.stage_cost import costs_of
from secondcast.trainer.distributed.processes import Distributed, init_distributed
from secondcast.trainer.dropout import BatchInvariantDropout
from secondcast.trainer.loop import Trainer
from secondcast.trainer.losses.objective import Objective
from secondcast.trainer.losses.validation import measure_replay_error
from secondcast.trainer.settings import TrainFlags
from secondcast.trainer.train import train
from tests.cache_builder.building import build_cache
from tests.trainer.data.worlds import CPU, WELL, forked, in_two
from tests.trainer.making import make_trainer

FLAGS = {
    "pretrain_steps": 4, "steps": 6, "batch_size": 8, "grad_accum_steps": 2, "timesteps_per_sample": 2, "dropout": 0.1,
    "ema_decay": 0.9, "max_grad_norm": 0.3, "learning_rate": 1e-3, "checkpoint_every": 5, "keep_checkpoints": 9,
    "validate_rows": 7, "replay_check": 9,
}  # fmt: skip


@pytest.fixture(scope="module")
def exact_cache(tmp_path_factory: pytest.TempPathFactory, dev_teacher: Path) -> Path:
    """In fp32: what rounding changes is small there."""
    folder = tmp_path_factory.mktemp("exact")
    things = [f"a {c} {t} {s}\n" for c in ("red", "green") for t in ("dog", "cat", "car") for s in ("up", "down")]
    # The last two are held out.
    (folder / "p.txt").write_text("".join(things) + "two dogs 31\ntwo dogs 42\n")
    build_cache(folder / "cache", dev_teacher, folder / "p.txt", shard_size=8, batch_size=8, dtype="float32")
    return folder / "cache"


@pytest.fixture(scope="module")
def work(exact_cache: Path, dev_teacher: Path, t5_config: Path) -> Callable[..., None]:
    """Trains as one of some processes, as `secondcast train` does."""

    def trained(run: Path, processes: Distributed, time_budget_seconds: float | None = None, **changes) -> None:
        settings = TrainFlags.from_flags(student=str(t5_config), **FLAGS | changes).settings()
        if time_budget_seconds is not None:
            main = settings.stages[-1].model_copy(update={"steps": None, "budget_share": 1.0})
            settings = settings.model_copy(update={"stages": (main,), "time_budget_seconds": time_budget_seconds})
        caches, teacher = {"cache": Cache.open(exact_cache)}, find_teacher(str(dev_teacher), REPLAY_PARTS)
        train(
            run, settings, caches, teacher, CPU, Silent(), student_source=str(t5_config), ignore_replay_error=False,
            processes=processes,
        )  # fmt: skip

    return trained


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
    """Without the summary, which is of the first process."""
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [entry for entry in entries if "summary" not in entry]


@pytest.fixture(scope="module")
def one(work, tmp_path_factory) -> Path:
    """What a single process trains."""
    run = tmp_path_factory.mktemp("one") / "run"
    work(run, Distributed())
    return run


@pytest.fixture(scope="module")
def halves(work, tmp_path_factory) -> Path:
    """What two processes train of which each holds a half of the student."""
    run = tmp_path_factory.mktemp("halves") / "run"
    assert in_two(lambda processes: work(run, processes), sharded=True) == WELL
    return run


def same_run(one: Path, other: Path) -> bool:
    assert [folder.name for folder in checkpoints(one)] == [folder.name for folder in checkpoints(other)]
    # Who goes on measures the replay error again.
    steps = [[entry for entry in metrics(run) if "replay_error" not in entry] for run in (one, other)]
    for entry, found in zip(*steps, strict=True):
        assert flat(found) == pytest.approx(flat(entry), rel=1e-4, abs=1e-12)
    return max(furthest(a, b) for a, b in zip(checkpoints(one), checkpoints(other), strict=True)) < 1e-4


@pytest.mark.slow
def test_two_processes_train_what_one_does(tmp_path, work, one):
    assert in_two(lambda processes: work(tmp_path / "two", processes)) == WELL
    assert same_run(one, tmp_path / "two")
    assert furthest(checkpoints(one)[0], checkpoints(one)[-1]) > 1e-2
    assert [entry["step"] for entry in metrics(one) if "validation_loss" in entry] == [4, 5, 10]
    assert (one / "best.json").read_bytes().startswith(b'{"checkpoint": "checkpoint-00000010"')


@pytest.mark.slow
def test_two_processes_divide_by_the_variances_that_the_first_measured(tmp_path, work):
    depth = {"loss": "depth", "timesteps_per_sample": 1, "pretrain_steps": 0}
    work(tmp_path / "one", Distributed(), **depth)
    assert in_two(lambda processes: work(tmp_path / "two", processes, **depth)) == WELL
    assert same_run(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_two_processes_train_halves_of_what_one_does(one, halves):
    assert same_run(one, halves)


def flat(entry: dict) -> dict[str, float]:
    steps = {f"{key} {k}": v for key, value in entry.items() if isinstance(value, dict) for k, v in value.items()}
    numbers = {key: value for key, value in entry.items() if isinstance(value, int | float) and key != "seconds"}
    return numbers | steps


@pytest.mark.thorough
def test_masks_that_depend_on_how_a_batch_is_divided_would_train_another_student(tmp_path, work, one, monkeypatch):
    class OfThePart(BatchInvariantDropout):
        def __init__(self, *, first: int, rows: int) -> None:
            super().__init__(first=0, rows=rows)

    monkeypatch.setattr(loop, "BatchInvariantDropout", OfThePart)
    assert in_two(lambda processes: work(tmp_path / "two", processes, steps=0)) == WELL
    assert furthest(checkpoints(one)[0], checkpoints(tmp_path / "two")[0]) > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True], ids=["each holds the student", "the student is divided"])
def test_two_processes_go_on_where_one_stopped(tmp_path, work, one, sharded):
    run = shutil.copytree(one, tmp_path / "run")
    # Both go back to the checkpoint that the first one can read.
    (checkpoints(run)[-1] / "optimizer.safetensors").write_bytes(b"torn")
    assert in_two(lambda processes: work(run, processes), sharded=sharded) == WELL
    assert same_run(one, run)


@pytest.mark.slow
def test_one_process_goes_on_where_two_stopped(tmp_path, work, one, halves):
    run = shutil.copytree(halves, tmp_path / "run")
    shutil.rmtree(checkpoints(run)[-1])
    work(run, Distributed())
    assert same_run(one, run)


def test_a_divided_student_lies_in_parts(exact_cache, t5_config):
    def look(processes: Distributed) -> None:
        teacher = Cache.open(exact_cache).manifest.teacher
        student = new_student(str(t5_config), teacher, init="auto", dropout=0.0, seed=0)
        count = sum(value.numel() for value in student.parameters())
        placed = processes.placed(student, CPU)
        held = sum(value.to_local().numel() for value in placed.parameters())
        assert processes.gathered([float(held)]) == pytest.approx([count / 2] * 2, rel=0.1)

    assert in_two(look, sharded=True) == WELL


def test_two_processes_measure_the_replay_error_that_one_does(tmp_path, exact_cache, dev_teacher, t5_config):
    trainer = make_trainer(tmp_path, exact_cache, dev_teacher, t5_config, backbone_dtype="bfloat16")
    # Three parts of four, four and three rows: one process has nothing to do in its second turn.
    alone = measure_replay_error(trainer.objective, trainer.dataset, rows=11, processes=Distributed())

    def together(processes: Distributed) -> None:
        replay_error = measure_replay_error(trainer.objective, trainer.dataset, rows=11, processes=processes)
        assert replay_error.error == pytest.approx(alone.error, rel=0.01) and replay_error.error > 1e-9
        assert replay_error.relative == pytest.approx(alone.relative, rel=0.01)
        assert replay_error.by_step == pytest.approx(alone.by_step, rel=0.01)

    assert in_two(together) == WELL


@pytest.mark.thorough
def test_a_loss_that_is_not_finite_in_one_process_stops_all_and_names_its_records(tmp_path, work, monkeypatch):
    real, seen = Objective.training_loss, []

    def broken(self: Objective, stage, student_BTD: torch.Tensor, batch) -> torch.Tensor:
        seen.append(stage)
        # The second part of step 5 in the second process.
        wrong = len(seen) == 5 * stage.grad_accum_steps + 2 and rank == 1
        return real(self, stage, student_BTD, batch) * (float("nan") if wrong else 1.0)

    def together(processes: Distributed) -> None:
        nonlocal rank
        rank = processes.rank
        monkeypatch.setattr(Objective, "training_loss", broken)
        work(tmp_path / "run", processes)

    rank = 0
    said = in_two(together)
    assert said[0] == said[1] and said[0].startswith("NonFiniteError: vision loss is nan at step 5, in the batch of ")
    (entry,) = [entry for entry in metrics(tmp_path / "run") if "stopped" in entry]
    assert len(entry["records"]) == 2 and all(record in said[0] for record in entry["records"])
    assert [folder.name for folder in checkpoints(tmp_path / "run")] == ["checkpoint-00000004", "checkpoint-00000005"]


def test_all_stop_where_the_first_cannot_write(tmp_path, work):
    (tmp_path / "run").write_text("")
    said = in_two(lambda processes: work(tmp_path / "run", processes))
    reason = f"{tmp_path}/run is a file, expected a new folder or the folder of this run: give another one"
    assert said == {0: f"RunError: {reason}", 1: f"WorkerFailedError: process 1 of 2 stopped with process 0: {reason}"}


def test_who_loses_the_others_says_so_in_one_line():
    def one_leaves(processes: Distributed) -> None:
        if processes.is_main_process:
            os._exit(1)
        processes.summed([1.0])

    said = in_two(one_leaves, ended=1)
    assert re.fullmatch(
        r"WorkerFailedError: process 1 of 2 lost the connection \(.*\), because another process ended: fix the error "
        r"that it reports and run the same command again to resume from the last checkpoint",
        said[1],
    )


def test_numbers_of_all_come_in_the_order_of_the_processes():
    def together(processes: Distributed) -> None:
        rank = processes.rank
        assert processes.gathered([rank + 0.25, float("nan") if rank else 7.0])[:3] == [0.25, 7.0, 1.25]
        assert math.isnan(processes.gathered([float("nan") if rank else 7.0])[1])
        assert processes.summed([1.0, float(rank)]) == [2.0, 1.0]
        assert processes.largest([float(rank), -float(rank)]) == [1.0, 0.0]
        assert processes.broadcast_from_rank0(lambda: {"a": [rank, None, "\u00e9"]}) == {"a": [0, None, "\u00e9"]}

    assert in_two(together) == WELL


def test_a_batch_that_does_not_divide_is_refused(tmp_path, work):
    with pytest.raises(SettingsError) as refused:
        work(tmp_path / "run", Distributed(rank=0, ranks=3), pretrain_steps=0)
    assert str(refused.value) == (
        "batch-size is 8 on 3 processes, expected a multiple of processes x grad-accum-steps x timesteps-per-sample = "
        "3 x 2 x 2: each process computes an equal part of a batch; use 12, or another number of processes"
    )
    assert not (tmp_path / "run").exists()


def test_processes_that_cannot_meet_say_why(monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    with pytest.raises(SettingsError) as refused, init_distributed(0, 2, CPU):
        pass
    assert str(refused.value) == (
        "2 processes train together, but MASTER_ADDR and MASTER_PORT are not set: start them with torchrun or "
        "accelerate launch, or set both (the name of the first node, a free port)"
    )


def test_a_single_process_has_nobody_to_share_a_student_with():
    with pytest.raises(SettingsError) as refused, init_distributed(0, 1, CPU, sharded=True):
        pass
    assert str(refused.value) == (
        "--fsdp shards the student across processes, but this is the only one: start several, as in torchrun "
        "--nproc-per-node 2 --no-python secondcast train ..., or remove it"
    )


@pytest.mark.thorough
def test_a_budget_is_shared_out_alike_in_all(tmp_path, work):
    def together(processes: Distributed) -> None:
        # The second one is slower: its time counts.
        pause = 0.05 * processes.rank
        real = Trainer.timed_steps
        Trainer.timed_steps = lambda trainer: [replace(step, seconds=step.seconds + pause) for step in real(trainer)]
        work(tmp_path / "run", processes, time_budget_seconds=0.5, replay_check=0, ema_decay=None)

    assert in_two(together) == WELL
    assert 1 <= len([entry for entry in metrics(tmp_path / "run") if "loss" in entry]) <= 0.5 / 0.05


@pytest.mark.thorough
def test_the_command_joins_the_processes_that_torchrun_started(tmp_path, exact_cache, t5_config, dev_teacher):
    words = ["train", tmp_path / "run", "--cache", exact_cache, "--student", t5_config, "--backbone"]
    words += [dev_teacher, "--device", "cpu", "--fsdp", "--steps", 2, "--batch-size", 4]

    def body(rank: int) -> str:
        os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
        sys.argv = ["secondcast", *map(str, words)]
        said = io.StringIO()
        with redirect_stdout(said), redirect_stderr(said), pytest.raises(SystemExit) as ended:
            cli.main()
        return f"{ended.value.code}: {said.getvalue()}"

    said = forked(body)
    assert said[1] == "0: "
    assert said[0].startswith("0: 2 processes (by torchrun) divide each batch\nstudent of ")
    assert f"\n{tmp_path}/run: student trained for 2 steps\n" in said[0]
    assert student_folder(tmp_path / "run").is_dir()


@pytest.mark.thorough
def test_processes_fit_into_the_least_memory_that_one_of_them_has(tmp_path, exact_cache, t5_config, monkeypatch):
    settings = TrainFlags.from_flags(student=str(t5_config), **FLAGS).settings()
    manifests = {"cache": Cache.open(exact_cache).manifest}

    def fits(processes: Distributed) -> None:
        # Of their own GPUs, were there any.
        monkeypatch.setattr(fitting, "free_bytes", lambda fit, device: (80 - 72 * processes.rank) * fitting.GIB)
        made, said = [], []

        def make_costs(**given):
            made.append(given)
            return costs_of(manifests, str(t5_config), ranks=processes.ranks, **given)

        chosen = fitting.fit_run(
            settings,
            make_costs,
            max_gpu_memory="auto",
            run=tmp_path / "run",
            processes=processes,
            held=(),
            say=said.append,
        )
        assert chosen == settings
        assert made == ([{"local_ranks": 2}] if processes.is_main_process else [])
        assert [line[:36] for line in said] == (
            ["to fit into 8.0 GiB: no change, 1.0 "] if processes.is_main_process else []
        )

    assert in_two(fits) == WELL

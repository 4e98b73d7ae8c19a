"""SIGKILL of a process that trains, in each step of a checkpoint and between optimizer steps: nothing is lost."""

import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from secondcast.models.student.folder import checkpoints
from tests.trainer.test_train import StopAfter, run_training, same_weights

FLAGS = {
    "pretrain_steps": 2,
    "steps": 4,
    "checkpoint_every": 2,
    "keep_checkpoints": 1,
    "ema_decay": 0.9,
    "dropout": 0.1,
    "init": "random",
}
PATIENCE_SECONDS = 60.0
# In the order of a run: each start comes further than the one before, but for the metrics, which a start cuts first.
STEPS_ON_DISK = [
    ("rename", ".checkpoint-00000002."),
    ("replace", ".best.json."),
    ("replace", ".metrics.jsonl."),
    ("rename", ".checkpoint-00000004."),
    ("rename", "checkpoint-00000002"),
    ("rmtree", ".checkpoint-00000002."),
]


def kill_before(name: str, start: str) -> None:
    """Have this process killed before it renames, or removes, what has a name with that start."""
    for owner in (Path, shutil):
        if hasattr(owner, name):
            setattr(owner, name, _deadly(getattr(owner, name), start))


def _deadly(work: Callable, start: str) -> Callable:
    def deadly(path, *values, **named):
        if path.name.startswith(start):
            os.kill(os.getpid(), signal.SIGKILL)
        return work(path, *values, **named)

    return deadly


class KillAfter(StopAfter):
    def advance(self, count, note=""):
        try:
            super().advance(count, note)
        except KeyboardInterrupt:
            os.kill(os.getpid(), signal.SIGKILL)


def was_killed(work: Callable[[], object]) -> bool:
    """Whether `work`, in a process of its own, was killed before its end; it must not fail otherwise."""
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(PATIENCE_SECONDS)
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def metrics(run: Path) -> list[dict]:
    """Without what was timed, and the replay error that each start measures anew."""
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{**entry, "seconds": 0} for entry in entries if not {"replay_error", "summary"} & entry.keys()]


def assert_same_run(run: Path, other: Path) -> None:
    assert same_weights(run, other)
    assert metrics(run) == metrics(other)
    assert (run / "best.json").read_bytes() == (other / "best.json").read_bytes()
    states = [(checkpoints(folder)[-1] / "state.json").read_bytes() for folder in (run, other)]
    assert states[0] == states[1]


@pytest.fixture(scope="module")
def unkilled(tmp_path_factory, cache_folder, dev_teacher, t5_config) -> Path:
    return run_training(tmp_path_factory.mktemp("unkilled") / "run", cache_folder, dev_teacher, t5_config, **FLAGS)


@pytest.mark.slow
def test_killed_in_each_step_of_a_checkpoint_a_run_ends_as_one_that_was_not(
    tmp_path, cache_folder, dev_teacher, t5_config, unkilled
):
    def train(name: str, start: str) -> None:
        kill_before(name, start)
        run_training(tmp_path / "run", cache_folder, dev_teacher, t5_config, **FLAGS)

    for step in STEPS_ON_DISK:
        assert was_killed(partial(train, *step)), step
    run_training(tmp_path / "run", cache_folder, dev_teacher, t5_config, **FLAGS)
    assert_same_run(tmp_path / "run", unkilled)


@pytest.mark.slow
def test_killed_between_optimizer_steps_a_run_ends_as_one_that_was_not(
    tmp_path, cache_folder, dev_teacher, t5_config, unkilled
):
    def train(steps: int) -> None:
        run_training(tmp_path / "run", cache_folder, dev_teacher, t5_config, progress=KillAfter(steps), **FLAGS)

    for steps in (1, 3):
        assert was_killed(partial(train, steps))
    run_training(tmp_path / "run", cache_folder, dev_teacher, t5_config, **FLAGS)
    assert_same_run(tmp_path / "run", unkilled)


@pytest.mark.thorough
def test_killed_while_it_writes_down_its_settings_a_run_can_begin_again(
    tmp_path, cache_folder, dev_teacher, t5_config, unkilled
):
    def train() -> None:
        kill_before("replace", ".config.json.")
        run_training(tmp_path / "run", cache_folder, dev_teacher, t5_config, **FLAGS)

    assert was_killed(train)
    run_training(tmp_path / "run", cache_folder, dev_teacher, t5_config, **FLAGS)
    assert_same_run(tmp_path / "run", unkilled)

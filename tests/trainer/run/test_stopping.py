"""Ctrl-C and SIGTERM keep what a run has learned: the step in hand is finished, and a checkpoint stands behind it."""

import json
import os
import signal
import threading
import time
from contextlib import nullcontext

import pytest

from secondcast.models.student.folder import checkpoints
from secondcast.models.teacher.folder import REPLAY_PARTS, find_teacher
from secondcast.storage_schemas.progress import Silent
from secondcast.storage_schemas.reader import Cache
from secondcast.trainer.run import stopping
from secondcast.trainer.run.stopping import SignalHandler
from secondcast.trainer.settings import TrainFlags
from secondcast.trainer.train import train
from tests.trainer.data.mixing import run_settings
from tests.trainer.data.worlds import CPU, in_two
from tests.trainer.test_train import run_training, same_weights

FLAGS = {"pretrain_steps": 3, "steps": 4, "checkpoint_every": 100, "dropout": 0.2, "lr_schedule": "cosine"}
SAID = "stopping after this step with a checkpoint; interrupt again to stop now without one"


@pytest.fixture(autouse=True)
def as_the_command_line_does():
    """SIGTERM is Ctrl-C; of SIGINT a shell may have said that it is ignored."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    yield
    signal.signal(signal.SIGTERM, before)


class Interrupting(Silent):
    """Sends a signal to this process behind a step, and keeps what is said."""

    def __init__(self, after: int) -> None:
        self.left, self.heard, self.bars = after, [], []

    def bar(self, title, **counts):
        self.bars.append((title, counts["done"], counts["total"]))
        return nullcontext(self) if title.startswith("train") else Silent().bar(title, **counts)

    def advance(self, count, note=""):
        self.left -= 1
        if self.left == 0:
            signal.raise_signal(signal.SIGTERM)

    def say(self, message):
        self.heard.append(message)


@pytest.mark.thorough
@pytest.mark.parametrize("after", [2, 5])
def test_a_signal_leaves_a_checkpoint_of_its_step_and_the_run_goes_on_bit_for_bit(
    tmp_path, cache_folder, dev_teacher, t5_config, after
):
    run_training(tmp_path / "whole", cache_folder, dev_teacher, t5_config, **FLAGS)
    progress = Interrupting(after)
    with pytest.raises(KeyboardInterrupt):
        run_training(tmp_path / "cut", cache_folder, dev_teacher, t5_config, progress=progress, **FLAGS)
    assert checkpoints(tmp_path / "cut")[-1].name == f"checkpoint-{after:08d}"
    assert SAID in progress.heard
    assert progress.heard[-1] == f"stopped after step {after} of 7; the last checkpoint is of step {after}"
    eval_student = [
        json.loads(line)["step"] for line in (tmp_path / "cut/metrics.jsonl").open() if "validation_loss" in line
    ]
    assert eval_student == [step for step in (3,) if step < after]
    run_training(tmp_path / "cut", cache_folder, dev_teacher, t5_config, **FLAGS)
    assert same_weights(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.thorough
def test_each_stage_has_a_bar_of_its_own_that_goes_on_where_it_was(tmp_path, cache_folder, dev_teacher, t5_config):
    first, second = Interrupting(5), Interrupting(9)
    with pytest.raises(KeyboardInterrupt):
        run_training(tmp_path / "run", cache_folder, dev_teacher, t5_config, progress=first, **FLAGS)
    run_training(tmp_path / "run", cache_folder, dev_teacher, t5_config, progress=second, **FLAGS)
    assert [bar for bar in first.bars if "train" in bar[0]] == [("train pretrain", 0, 3), ("train main", 0, 4)]
    assert [bar for bar in second.bars if "train" in bar[0]] == [("train main", 2, 4)]


def test_after_some_time_without_a_checkpoint_there_is_one_without_a_validation(tmp_path, cache_folder, t5_config):
    flags = {
        "loss": "embedding",
        "steps": 3,
        "checkpoint_every": 100,
        "keep_checkpoints": 9,
        "checkpoint_minutes": 1e-9,
    }
    run_training(tmp_path / "often", cache_folder, None, t5_config, **flags)
    run_training(tmp_path / "never", cache_folder, None, t5_config, **flags | {"checkpoint_minutes": 1e9})
    steps = [folder.name[-1] for folder in checkpoints(tmp_path / "often")]
    assert steps == ["1", "2", "3"] and [folder.name[-1] for folder in checkpoints(tmp_path / "never")] == ["3"]
    eval_student = [line for line in (tmp_path / "often/metrics.jsonl").open() if "validation_loss" in line]
    assert len(eval_student) == 1 and same_weights(tmp_path / "often", tmp_path / "never")
    # A run may be given another time when it goes on.
    run_training(tmp_path / "never", cache_folder, None, t5_config, **flags)


def test_stages_have_checkpoints_of_their_own_counted_from_their_beginning():
    stages = ({"name": "a", "steps": 5, "checkpoint_every": 2}, {"name": "b", "steps": 6, "checkpoint_every": 4})
    made = run_settings(*stages, {"name": "c", "steps": 5}, checkpoint_every=7)
    assert [done for done in range(1, 17) if made.is_checkpoint(done)] == [2, 4, 5, 9, 11, 14, 16]
    assert [made.checkpoint_steps(stage) for stage in made.stages] == [2, 4, 7]


def test_a_signal_at_the_last_step_does_not_go_unheard(tmp_path, cache_folder, t5_config):
    flags = {"pretrain_steps": 3, "steps": 0, "pretrain_loss": "embedding", "checkpoint_every": 100}
    with pytest.raises(KeyboardInterrupt):
        run_training(tmp_path / "run", cache_folder, None, t5_config, progress=Interrupting(3), **flags)
    assert [folder.name for folder in checkpoints(tmp_path / "run")] == ["checkpoint-00000003"]
    assert (tmp_path / "run/best.json").exists()


def test_a_second_signal_interrupts_at_once_but_not_one_that_torchrun_hands_on(monkeypatch):
    listening, heard = SignalHandler(), []
    with listening.listening(heard.append):
        assert not listening.asked
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert listening.asked
        monkeypatch.setattr(stopping, "_SAME_REQUEST_SECONDS", 0.0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    _wait_for(lambda: heard == [SAID])
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGTERM)


def test_what_a_process_ignores_it_goes_on_to_ignore():
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    listening = SignalHandler()
    with listening.listening(print):
        signal.raise_signal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, before)
    assert not listening.asked


def test_a_thread_trains_without_listening():
    failed = []

    def body() -> None:
        try:
            with SignalHandler().listening(print):
                pass
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert failed == []


def _wait_for(condition) -> None:
    until = time.monotonic() + 10
    while not condition() and time.monotonic() < until:
        time.sleep(0.01)
    assert condition()


@pytest.mark.slow
def test_processes_stop_after_the_same_step_whichever_was_asked(tmp_path, cache_folder, dev_teacher, t5_config):
    settings = TrainFlags.from_flags(
        student=str(t5_config),
        batch_size=4,
        replay_check=4,
        validate_rows=16,
        learning_rate=1e-3,
        **FLAGS | {"steps": 300},
    ).settings()

    def work(processes) -> None:
        if not processes.is_main_process:
            # The first one is asked nothing; the other one in its second step.
            threading.Thread(target=_ask_behind_a_step, args=(tmp_path / "run", os.getpid()), daemon=True).start()
        train(
            tmp_path / "run", settings.model_copy(), {"cache": Cache.open(cache_folder)},
            find_teacher(str(dev_teacher), REPLAY_PARTS), CPU, Silent(), student_source=str(t5_config),
            ignore_replay_error=False, processes=processes,
        )  # fmt: skip

    said = in_two(work)
    assert all(text.strip().endswith("KeyboardInterrupt") for text in said.values()), said
    (left,) = checkpoints(tmp_path / "run")[-1:]
    steps = [json.loads(line)["step"] for line in (tmp_path / "run/metrics.jsonl").open() if "kind" in line]
    assert left.name == f"checkpoint-{len(steps):08d}" and steps == list(range(len(steps)))


def _ask_behind_a_step(run, process: int) -> None:
    while not (run / "metrics.jsonl").exists() or "kind" not in (run / "metrics.jsonl").read_text():
        time.sleep(0.001)
    os.kill(process, signal.SIGTERM)

"""What a run says of itself: the file, and its mirrors, read back by the real libraries."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secondcast.storage_schemas.errors import MissingExtraError
from secondcast.trainer.run.metrics import Metrics, scalars

STEP = {"kind": "vision", "learning_rate": 1e-4, "gradient_norm": 2.0, "seconds": 0.5}


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def curve(run: Path, tag: str) -> list[tuple[int, float]]:
    """Steps and values that TensorBoard shows."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(run / "tensorboard"), size_guidance={accumulator.SCALARS: 0})
    events.Reload()
    return [(event.step, pytest.approx(event.value, rel=1e-6)) for event in events.Scalars(tag)]


def log_run(metrics: Metrics, *, first: int, last: int, value: float) -> None:
    metrics.log(step=-1, replay_error=0.01) if first == 0 else None
    for step in range(first, last):
        metrics.log(step=step, loss=value + step, **STEP)
        if (step + 1) % 2 == 0:
            metrics.log(step=step + 1, validation_loss=value - step)


def test_the_tags_of_entries():
    assert scalars({"step": 12, "loss": 0.1, **STEP}) == {
        "train/loss": 0.1,
        "train/vision_loss": 0.1,
        "train/learning_rate": 1e-4,
        "train/gradient_norm": 2.0,
        "train/seconds": 0.5,
    }
    assert scalars({"validation_loss": 3, "validation_loss_step": [1.0, 2.0]}) == {
        "validation/loss": 3.0,
        "validation/loss_step_00": 1.0,
        "validation/loss_step_01": 2.0,
    }
    assert scalars({"validation_loss": {"dogs": 1.0}, "replay_error": 0.5}) == {
        "validation/loss/dogs": 1.0,
        "replay_error": 0.5,
    }
    assert scalars({"stopped": "loss is nan", "records": ["a/b", "c"], "best": True, "none": None}) == {}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=40)
@given(st.dictionaries(st.text(max_size=8), JSON, max_size=4))
def test_whatever_an_entry_holds_a_mirror_is_given_numbers_only(entry):
    assert all(isinstance(value, float) for value in scalars(entry).values())


def test_what_a_killed_run_logged_beyond_its_checkpoint_is_forgotten(tmp_path):
    with Metrics(tmp_path, say=print) as metrics:
        log_run(metrics, first=0, last=5, value=10.0)
        metrics.log(step=4, stopped="loss is nan", records=["a"])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    before = lines_of_whole(tmp_path)
    with Metrics(tmp_path, say=print) as metrics:
        metrics.truncate_after(4)
        # The validation of the checkpoint at step 4 was before it was saved.
        kept = [entry for entry in before if entry["step"] < 4 or "validation_loss" in entry]
        assert lines(tmp_path) == kept and kept[-1] == {"step": 4, "validation_loss": 7.0}
        log_run(metrics, first=4, last=6, value=20.0)
    losses = [(entry["step"], entry["loss"]) for entry in lines(tmp_path) if "loss" in entry]
    assert losses == [(0, 10), (1, 11), (2, 12), (3, 13), (4, 24), (5, 25)]
    assert list(tmp_path.iterdir()) == [tmp_path / "metrics.jsonl"]


def lines_of_whole(run: Path) -> list[dict]:
    text = (run / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text[: text.rindex("\n")].splitlines()]


def test_a_run_without_metrics_has_nothing_to_forget(tmp_path):
    with Metrics(tmp_path, say=print) as metrics:
        metrics.truncate_after(0)
    assert list(tmp_path.iterdir()) == []


def test_a_picture_goes_to_the_mirrors_alone(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    picture_HWC = np.zeros((4, 6, 3), dtype=np.uint8)
    with Metrics(tmp_path, mirrors=["tensorboard"], say=pytest.fail) as metrics:
        metrics.log_picture(step=3, tag="samples", picture_HWC=picture_HWC)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.width, event.height) for event in events.Images("samples")] == [(3, 6, 4)]
    assert not (tmp_path / "metrics.jsonl").exists()


def test_tensorboard_shows_each_step_once_after_a_kill(tmp_path):
    pytest.importorskip("tensorboard")
    said: list[str] = []
    # Not closed before the second begins: killed.
    killed = Metrics(tmp_path, mirrors=["tensorboard"], say=said.append)
    assert list(tmp_path.iterdir()) == []
    killed.truncate_after(0)
    log_run(killed, first=0, last=5, value=10.0)
    killed._mirrors["tensorboard"]._writer.flush()
    with Metrics(tmp_path, mirrors=["tensorboard"], say=said.append) as metrics:
        metrics.truncate_after(4)
        log_run(metrics, first=4, last=6, value=20.0)
    assert curve(tmp_path, "train/loss") == [(0, 10), (1, 11), (2, 12), (3, 13), (4, 24), (5, 25)]
    assert curve(tmp_path, "train/vision_loss") == curve(tmp_path, "train/loss")
    assert curve(tmp_path, "validation/loss") == [(2, 9), (4, 7), (6, 15)]
    assert curve(tmp_path, "replay_error") == [(-1, 0.01)]
    assert said == []
    killed.close()


def test_an_error_of_a_mirror_is_said_once_and_the_file_goes_on(tmp_path):
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorboard").write_text("in the way")
    said: list[str] = []
    with Metrics(tmp_path, mirrors=["tensorboard"], say=said.append) as metrics:
        log_run(metrics, first=0, last=3, value=1.0)
    (line,) = said
    assert line.startswith("--report-to tensorboard was disabled (FileExistsError: ")
    assert line.endswith(f"): training continues, and {tmp_path}/metrics.jsonl has all metrics") and "\n" not in line
    assert [entry["step"] for entry in lines(tmp_path) if "loss" in entry] == [0, 1, 2]


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_without_its_package_the_extra_is_named(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError) as caught:
        Metrics(tmp_path, mirrors=[name], say=print)
    assert (
        str(caught.value)
        == f"--report-to {name} needs {name}, which is not installed: pip install 'secondcast[{name}]'"
    )


@pytest.fixture
def offline(monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("WANDB_PROJECT", raising=False)


def test_weights_and_biases_goes_on_with_the_same_run_over_its_own_step(tmp_path, offline):
    (tmp_path / "config.json").write_text('{"cache": "flux-cache"}')
    seen = []
    for first, last in ((0, 3), (2, 4)):
        with Metrics(tmp_path, mirrors=["wandb"], say=pytest.fail) as metrics:
            metrics.truncate_after(first)
            log_run(metrics, first=first, last=last, value=1.0)
            metrics.log_picture(step=last, tag="samples", picture_HWC=np.zeros((4, 6, 3), dtype=np.uint8))
            run = metrics._mirrors["wandb"]._run
            seen.append((run.id, run.project, run.name, run.config["cache"], run.summary["optimizer_step"]))
            assert run.summary["train/loss"] == last and math.isclose(run.summary["train/learning_rate"], 1e-4)
    id = (tmp_path / "wandb_id.txt").read_text().strip()
    assert seen == [(id, "secondcast", tmp_path.name, "flux-cache", step) for step in (3, 4)]
    assert len(list((tmp_path / "wandb").rglob("media/images/samples_*.png"))) == 2
    folders = sorted((tmp_path / "wandb").glob("offline-run-*"))
    assert [folder.name.rsplit("-", 1)[1] for folder in folders] == [id] * len(folders) and folders
    assert b"train/loss" in b"".join(file.read_bytes() for file in (tmp_path / "wandb").rglob(f"run-{id}.wandb"))


def test_weights_and_biases_that_cannot_begin_is_said_once(tmp_path, offline):
    (tmp_path / "wandb_id.txt").write_text("no/id")
    said: list[str] = []
    with Metrics(tmp_path, mirrors=["wandb"], say=said.append) as metrics:
        log_run(metrics, first=0, last=3, value=1.0)
    (line,) = said
    assert line.startswith("--report-to wandb was disabled (") and "\n" not in line
    assert [entry["step"] for entry in lines(tmp_path) if "loss" in entry] == [0, 1, 2]

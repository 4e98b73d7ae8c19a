"""The replay error: what no student can go below here, told beside its loss, together and by step."""

import json
import re
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from secondcast.models.backbone import Backbone
from secondcast.models.student.folder import checkpoints
from secondcast.models.student.student import load_student
from secondcast.storage_schemas.errors import NonFiniteError, TeacherError
from secondcast.trainer import loop
from secondcast.trainer.losses import validation
from secondcast.trainer.losses.validation import Errors, ReplayError, spread_rows, validation_rows
from secondcast.trainer.losses.vision import row_errors
from tests.trainer.conftest import cache_folder, t5_config
from tests.trainer.making import make_trainer
from tests.trainer.test_train import Listening, StopAfter, run_training

__all__ = ["cache_folder", "t5_config"]

# A bf16 recording that is replayed in float32 has a replay error, 4 % of the velocity's norm with so small a
# transformer.
ABOVE = {
    "backbone_dtype": "float32",
    "steps": 4,
    "checkpoint_every": 2,
    "validate_rows": 12,
    "ignore_replay_error": True,
}


class Noting(Listening):
    """Keeps the notes beside the bar too."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[str] = []

    def bar(self, title, **counts):
        return nullcontext(self)

    def advance(self, count, note=""):
        self.notes.append(note)


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_loss_and_replay_error_stand_side_by_side_and_by_step(tmp_path, cache_folder, dev_teacher, t5_config):
    noting = Noting()
    run_training(
        tmp_path / "run",
        cache_folder,
        dev_teacher,
        t5_config,
        progress=noting,
        replay_check=8,
        pretrain_steps=1,
        **ABOVE,
    )
    measured = next(line for line in metrics(tmp_path / "run") if "replay_error" in line)
    replay_error, by_step = measured["replay_error"], measured["replay_error_by_step"]
    assert measured["step"] == 0 and replay_error > 0 and list(by_step) == ["0", "1", "2", "3"]
    assert replay_error == pytest.approx(sum(by_step.values()) / 4, rel=1e-6)
    told = next(line for line in noting.heard if line.startswith("replay error"))
    assert re.fullmatch(
        rf"replay error {replay_error:.3g} \(\d\.\d\d % of the velocity's norm\): no student's loss can be lower", told
    )
    losses = [line["loss"] for line in metrics(tmp_path / "run") if "kind" in line]
    beside = f" (replay error {replay_error:.3g})"
    assert noting.notes == [f"context loss {losses[0]:.4g}"] + [
        f"vision loss {loss:.4g}{beside}" for loss in losses[1:]
    ]


def test_the_replay_error_by_step_is_the_error_of_the_teachers_own_embedding(
    tmp_path, cache_folder, dev_teacher, t5_config
):
    trainer = make_trainer(
        tmp_path / "run", cache_folder, dev_teacher, t5_config, backbone_dtype="float32", replay_check=4 * 18
    )
    replay_error = trainer.measure_replay_error()
    dataset, backbone = trainer.dataset, trainer.objective.backbones[0]
    for k in range(4):
        batch = dataset.replay_batch([(position, k) for position in range(len(dataset))])
        teacher_BTD = dataset.teacher_embeddings([dataset.prompt_of(position) for position in range(len(dataset))])
        predicted_BSC = backbone.predict(
            batch.hidden_states_BSC.float(), teacher_BTD.float(), batch.conditioning, batch.timestep_B.float(),
            batch.guidance_B,
        )  # fmt: skip
        error = float((predicted_BSC - batch.velocity_BSC.float()).square().mean())
        assert replay_error.by_step[str(k)] == pytest.approx(error, rel=1e-3)


@pytest.mark.thorough
def test_no_replay_error_is_measured_where_none_is_asked_for(tmp_path, cache_folder, dev_teacher, t5_config):
    noting = Noting()
    run_training(tmp_path / "run", cache_folder, dev_teacher, t5_config, progress=noting, replay_check=0, **ABOVE)
    assert not any("replay_error" in line for line in metrics(tmp_path / "run"))
    assert not any("replay_error" in text for text in noting.heard + noting.notes)
    # It changes no weight: another number may be given when the run goes on.
    with pytest.raises(KeyboardInterrupt):
        run_training(
            tmp_path / "cut", cache_folder, dev_teacher, t5_config, progress=StopAfter(3), replay_check=0, **ABOVE
        )
    run_training(tmp_path / "cut", cache_folder, dev_teacher, t5_config, progress=noting, replay_check=4, **ABOVE)
    assert any(text.startswith("replay error") for text in noting.heard)


def test_the_loss_on_held_out_prompts_is_told_by_step(tmp_path, cache_folder, dev_teacher, t5_config):
    run_training(tmp_path / "run", cache_folder, dev_teacher, t5_config, replay_check=0, **ABOVE)
    validated = [line for line in metrics(tmp_path / "run") if "validation_loss" in line]
    assert [line["step"] for line in validated] == [2, 4]
    for line in validated:
        by_step = line["validation_loss_by_step"]
        # One trajectory is held out: as many records of each step.
        assert list(by_step) == ["0", "1", "2", "3"]
        assert line["validation_loss"] == pytest.approx(sum(by_step.values()) / 4, rel=1e-6)


@pytest.mark.parametrize("loss", ["context", "embedding"])
def test_a_warm_up_before_a_vision_stage_is_judged_by_recorded_predictions(
    tmp_path, cache_folder, dev_teacher, t5_config, loss
):
    flags = {
        "pretrain_loss": loss,
        "pretrain_steps": 2,
        "steps": 1,
        "checkpoint_every": 1,
        "keep_checkpoints": 3,
        "replay_check": 0,
    }
    run = run_training(tmp_path / "run", cache_folder, dev_teacher, t5_config, **flags)
    kinds = [line["kind"] for line in metrics(run) if "kind" in line]
    validated = [line["validation_loss"] for line in metrics(run) if "validation_loss" in line]
    assert kinds == [loss, loss, "vision"] and len(validated) == 3
    trainer = make_trainer(tmp_path / "probe", cache_folder, dev_teacher, t5_config, validate_rows=16)
    batch = trainer.held_out.replay_batch(validation_rows(trainer.held_out, 16))
    for checkpoint, told in zip(checkpoints(run), validated, strict=True):
        student = load_student(checkpoint / "student")
        with torch.no_grad():
            embedding_BTD = trainer.embed(student, batch.token_ids_BT)
            vision = float(row_errors(trainer.objective.backbones[0], embedding_BTD, batch).mean())
        assert told == pytest.approx(vision, rel=1e-4)
    # The best is chosen among all of them: they are of one kind.
    assert json.loads((run / "best.json").read_text())["loss"] == min(validated)


def test_a_loss_without_steps_has_none_by_step(tmp_path, cache_folder, t5_config):
    flags = {"loss": "embedding", "steps": 2, "checkpoint_every": 2}
    run_training(tmp_path / "run", cache_folder, None, t5_config, **flags)
    (line,) = [line for line in metrics(tmp_path / "run") if "validation_loss" in line]
    assert set(line) == {"step", "validation_loss"}


@pytest.mark.thorough
def test_a_loss_that_has_come_to_the_replay_error_is_told(tmp_path, cache_folder, dev_teacher, t5_config, monkeypatch):
    noting = Noting()
    run_training(tmp_path / "far", cache_folder, dev_teacher, t5_config, progress=noting, replay_check=8, **ABOVE)
    assert not any("has reached the replay error" in text for text in noting.heard)
    # No student of this size comes so near in four steps.
    monkeypatch.setattr(validation, "_NEAR_REPLAY_ERROR", 1e9)
    run_training(tmp_path / "near", cache_folder, dev_teacher, t5_config, progress=noting, replay_check=8, **ABOVE)
    lines = metrics(tmp_path / "near")
    replay_error = next(line["replay_error"] for line in lines if "replay_error" in line)
    losses = [line["validation_loss"] for line in lines if "validation_loss" in line]
    best = [loss for number, loss in enumerate(losses) if loss == min(losses[: number + 1])]
    assert [text for text in noting.heard if "has reached" in text] == [
        f"validation loss {loss:.4g} has reached the replay error {replay_error:.4g}: the remainder is the "
        "difference between this backbone and the recorded one, which no student can learn"
        for loss in best
    ]
    assert len(checkpoints(tmp_path / "near")) == 2


@given(count=st.integers(1, 60), steps=st.integers(1, 30), wanted=st.integers(1, 200))
def test_records_that_are_judged_are_different_and_spread_over_trajectories_and_steps(count, steps, wanted):
    rows = spread_rows(count, steps, wanted)
    assert len(set(rows)) == len(rows) == min(wanted, count * steps)
    assert all(0 <= position < count and 0 <= k < steps for position, k in rows)
    for part, parts in ((0, count), (1, steps)):
        times = Counter(row[part] for row in rows)
        assert max(times.values()) - min(times.get(n, 0) for n in range(parts)) <= 1


@pytest.mark.thorough
def test_a_student_whose_validation_is_no_number_gets_no_checkpoint(
    tmp_path, cache_folder, dev_teacher, t5_config, monkeypatch
):
    run_training(tmp_path / "run", cache_folder, dev_teacher, t5_config, steps=2)
    monkeypatch.setattr(loop, "validation_loss", lambda *_, **__: Errors(rows=[(0, 0)], values=[float("nan")]))
    message = (
        "validation loss is nan after 2 steps: stopped, the last checkpoint is intact; lower --learning-rate and run "
        "it again with a new run folder"
    )
    with pytest.raises(NonFiniteError, match=f"^{re.escape(message)}$"):
        run_training(tmp_path / "other", cache_folder, dev_teacher, t5_config, steps=2)
    assert checkpoints(tmp_path / "run") and not checkpoints(tmp_path / "other")
    assert json.loads((tmp_path / "other/metrics.jsonl").read_text().splitlines()[-1]) == {
        "step": 2,
        "stopped": "validation loss is nan",
    }


def test_a_replay_error_that_is_no_number_is_refused(tmp_path, cache_folder, dev_teacher, t5_config, monkeypatch):
    nothing = ReplayError(error=float("nan"), by_step={}, relative=float("nan"))
    monkeypatch.setattr(loop, "measure_replay_error", lambda *_, **__: nothing)
    with pytest.raises(TeacherError, match="the cached embeddings replay with an error of nan %"):
        run_training(tmp_path / "run", cache_folder, dev_teacher, t5_config)


@pytest.mark.thorough
def test_no_more_rows_at_once_are_validated_by_replay_than_the_replay_trains_with(
    tmp_path, cache_folder, dev_teacher, t5_config, monkeypatch
):
    made = make_trainer(tmp_path, cache_folder, dev_teacher, t5_config, pretrain_steps=2, pretrain_loss="embedding")
    pretrain, main = made.settings.stages
    divided = made.settings.model_copy(update={"stages": (pretrain, main.model_copy(update={"grad_accum_steps": 4}))})
    made.objective, rows = replace(made.objective, settings=divided), []
    predict = Backbone.predict

    def counted(self, hidden_states_BSC, *given, **named):
        rows.append(len(hidden_states_BSC))
        return predict(self, hidden_states_BSC, *given, **named)

    monkeypatch.setattr(Backbone, "predict", counted)
    made.validate(0)
    made.measure_replay_error()
    assert max(rows) == 2 < pretrain.batch_size

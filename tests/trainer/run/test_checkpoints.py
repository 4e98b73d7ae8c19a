"""Checkpoints: the last ones and the best are kept, damage is found, a full disk loses nothing, old runs go on."""

import errno
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch

from secondcast.models.student.folder import checkpoints, student_folder
from secondcast.models.student.student import load_student
from secondcast.storage_schemas.errors import RunError
from secondcast.trainer.loop import Observer, Trainer
from secondcast.trainer.run.checkpoints.best import delete_old_checkpoints, validation_text
from secondcast.trainer.run.checkpoints.loading import load_checkpoint
from tests.commands.limits import no_file_above, outside_of_private_folders, unprivileged
from tests.trainer.making import make_trainer
from tests.trainer.test_train import Listening, StopAfter, run_training, same_weights


def names(run: Path) -> set[str]:
    return {folder.name for folder in checkpoints(run)}


def best_of(run: Path) -> str:
    return str(json.loads((run / "best.json").read_text())["checkpoint"])


@pytest.mark.thorough
@pytest.mark.parametrize(("keep", "last"), [(1, {8}), (3, {4, 6, 8})])
def test_the_last_checkpoints_and_the_best_are_kept(tmp_path, cache_folder, dev_teacher, t5_config, keep, last):
    run_training(tmp_path / "run", cache_folder, dev_teacher, t5_config, steps=8, keep_checkpoints=keep)
    best = best_of(tmp_path / "run")
    assert names(tmp_path / "run") == {f"checkpoint-{step:08d}" for step in last} | {best}
    assert student_folder(tmp_path / "run") == tmp_path / "run" / best / "student"
    load_student(student_folder(tmp_path / "run"))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("file", "damage", "reason"),
    [
        ("optimizer.safetensors", cut, r"optimizer.safetensors has checksum \w{32}, expected \w{32}"),
        ("student/model.safetensors", flip, r"student/model.safetensors has checksum \w{32}, expected \w{32}"),
        ("trained.safetensors", flip, r"trained.safetensors has checksum \w{32}, expected \w{32}"),
        ("state.json", cut, r"Unterminated string|Expecting|delimiter"),
        ("state.json", Path.unlink, r"No such file or directory"),
        ("student/config.json", Path.unlink, r"No such file or directory"),
    ],
)
def test_a_damaged_checkpoint_falls_back_to_the_one_before_and_says_so(
    tmp_path, cache_folder, dev_teacher, t5_config, whole_run, file, damage, reason
):
    shutil.copytree(whole_run["cut"], tmp_path / "cut")
    older, newest = checkpoints(tmp_path / "cut")
    damage(newest / file)
    heard = Listening()
    run_training(tmp_path / "cut", cache_folder, dev_teacher, t5_config, progress=heard, **whole_run["flags"])
    (said,) = [line for line in heard.heard if "cannot be read" in line]
    assert said.startswith(f"{newest} cannot be read (") and said.endswith("): falling back to the previous checkpoint")
    assert re.search(reason, said)
    assert f"resuming from step {int(older.name[-8:])}" in heard.heard
    assert same_weights(tmp_path / "cut", whole_run["whole"])


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, cache_folder, dev_teacher, t5_config):
    """A run of six steps, and the same one stopped after five."""
    folder, flags = tmp_path_factory.mktemp("runs"), {"ema_decay": 0.5}
    run_training(folder / "whole", cache_folder, dev_teacher, t5_config, **flags)
    with pytest.raises(KeyboardInterrupt):
        run_training(folder / "cut", cache_folder, dev_teacher, t5_config, progress=StopAfter(5), **flags)
    assert names(folder / "cut") == {"checkpoint-00000002", "checkpoint-00000004"}
    return {"whole": folder / "whole", "cut": folder / "cut", "flags": flags}


def test_without_one_whole_checkpoint_it_stops_and_changes_nothing(
    tmp_path, cache_folder, dev_teacher, t5_config, whole_run
):
    run = tmp_path / "cut"
    shutil.copytree(whole_run["cut"], run)
    for folder in checkpoints(run):
        flip(folder / "optimizer.safetensors")
    before = contents(run)
    with pytest.raises(RunError) as caught:
        run_training(run, cache_folder, dev_teacher, t5_config, **whole_run["flags"])
    assert re.fullmatch(
        rf"{run}/checkpoint-00000004 cannot be read \(optimizer.safetensors has checksum \w{{32}}, expected "
        r"\w{32}\), and none of the 1 before it: a run does not restart over its checkpoints; restore one of them "
        r"from a backup, or give a new run folder",
        str(caught.value),
    )
    assert contents(run) == before


def contents(run: Path) -> dict[str, bytes]:
    return {str(file.relative_to(run)): file.read_bytes() for file in run.rglob("*") if file.is_file()}


@pytest.mark.parametrize("best", ['{"checkpoint": "checkpoint-00000004", "loss": 1.0}', ""])
def test_a_run_whose_checkpoints_are_lost_is_not_begun_again(
    tmp_path, cache_folder, dev_teacher, t5_config, whole_run, best
):
    run = tmp_path / "cut"
    shutil.copytree(whole_run["cut"], run)
    for folder in checkpoints(run):
        folder.rename(tmp_path / folder.name)
    (run / "best.json").write_text(best)
    before = contents(run)
    with pytest.raises(
        RunError, match=rf"^{run} has no checkpoint.* (best.json names checkpoint-00000004|an unreadable best.json)"
    ):
        run_training(run, cache_folder, dev_teacher, t5_config, **whole_run["flags"])
    assert contents(run) == before


@pytest.mark.parametrize("file", ["optimizer.safetensors", "state.json", "student/model.safetensors", ""])
def test_files_that_may_not_be_read_are_no_damage(tmp_path, cache_folder, dev_teacher, t5_config, whole_run, file):
    with outside_of_private_folders() as place:
        run = place / "cut"
        shutil.copytree(whole_run["cut"], run)
        trainer = make_trainer(run, cache_folder, dev_teacher, t5_config, **whole_run["flags"])
        (run / "checkpoint-00000004" / file).chmod(0)
        (run / "config.json").chmod(0o644)
        before = contents(run) if os.geteuid() == 0 else None
        with unprivileged(), pytest.raises(RunError) as caught:
            load_checkpoint(run, trainer.train_state, pytest.fail)
        where = run / "checkpoint-00000004" / (file or "state.json")
        assert str(caught.value) == (
            f"{where} cannot be read (Permission denied): the checkpoint is not damaged, nothing is changed; make its "
            "files readable for this user and run the same command again"
        )
        assert before is None or contents(run) == before
        (run / "checkpoint-00000004" / file).chmod(0o700)


def test_a_disk_that_fails_is_no_damage(tmp_path, cache_folder, dev_teacher, t5_config, whole_run, monkeypatch):
    run = tmp_path / "cut"
    shutil.copytree(whole_run["cut"], run)
    file = run / "checkpoint-00000004/optimizer.safetensors"
    real = Path.open

    def fails(path, *how, **named):
        if path == file:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return real(path, *how, **named)

    trainer = make_trainer(run, cache_folder, dev_teacher, t5_config, **whole_run["flags"])
    monkeypatch.setattr(Path, "open", fails)
    said = rf"^{file} cannot be read \(Input/output error\): the disk fails, nothing is changed"
    with pytest.raises(RunError, match=said):
        load_checkpoint(run, trainer.train_state, pytest.fail)


@pytest.mark.thorough
def test_copies_and_archives_beside_checkpoints_are_neither_read_nor_deleted(
    tmp_path, cache_folder, dev_teacher, t5_config, whole_run
):
    run = tmp_path / "cut"
    shutil.copytree(whole_run["cut"], run)
    old = run / "checkpoint-00000002"
    copies = [
        "checkpoint-keep",
        "checkpoint-00000002-good",
        "checkpoint-2",
        "checkpoint-99999999",
        "checkpoint-000000020",
    ]
    for name in copies:
        shutil.copytree(old, run / name)
    (run / "checkpoint-00000003.tar").write_bytes(b"tar")
    (run / "checkpoint-00000005").write_bytes(b"a file")
    (run / "checkpoint-00000001").symlink_to(old)
    (run / ".checkpoint-notes.tmp").mkdir()
    (run / ".checkpoint-notes.tmp/mine").write_bytes(b"mine")
    assert [folder.name for folder in checkpoints(run)] == ["checkpoint-00000002", "checkpoint-00000004"]
    before = {name: contents(run / name) for name in copies}
    heard = Listening()
    run_training(run, cache_folder, dev_teacher, t5_config, progress=heard, **whole_run["flags"])
    assert "resuming from step 4" in heard.heard and same_weights(run, whole_run["whole"])
    for name in ("checkpoint-99999999", "checkpoint-00000005", "checkpoint-00000001"):
        said = f"{run / name} is not a checkpoint that this run wrote under this name: ignored"
        assert said in heard.heard
    assert {name: contents(run / name) for name in copies} == before
    assert (run / "checkpoint-00000003.tar").read_bytes() == b"tar"
    assert (run / "checkpoint-00000005").read_bytes() == b"a file" and (run / "checkpoint-00000001").is_symlink()
    assert (run / ".checkpoint-notes.tmp/mine").read_bytes() == b"mine"


@pytest.mark.thorough
def test_what_stands_in_the_way_of_a_checkpoint_gets_another_name_and_stays(
    tmp_path, cache_folder, dev_teacher, t5_config, whole_run
):
    run = tmp_path / "cut"
    shutil.copytree(whole_run["cut"], run)
    shutil.copytree(run / "checkpoint-00000002", run / "checkpoint-00000006")
    (run / "checkpoint-00000006-kept-1").mkdir()
    before = contents(run / "checkpoint-00000002")
    heard = Listening()
    run_training(run, cache_folder, dev_teacher, t5_config, progress=heard, **whole_run["flags"])
    assert same_weights(run, whole_run["whole"]) and contents(run / "checkpoint-00000006-kept-2") == before
    assert (
        f"{run}/checkpoint-00000006 is not a readable checkpoint of this run: renamed to checkpoint-00000006-kept-2"
    ) in heard.heard


@pytest.mark.thorough
def test_a_checkpoint_of_another_run_is_not_gone_on_from(tmp_path, cache_folder, dev_teacher, t5_config, whole_run):
    other = run_training(tmp_path / "other", cache_folder, dev_teacher, t5_config, **whole_run["flags"], seed=5)
    run = tmp_path / "cut"
    shutil.copytree(whole_run["cut"], run)
    shutil.copytree(other / "checkpoint-00000006", run / "checkpoint-00000006")
    assert checkpoints(run)[-1].name == "checkpoint-00000004"
    run_training(run, cache_folder, dev_teacher, t5_config, **whole_run["flags"])
    assert same_weights(run, whole_run["whole"])


@pytest.mark.parametrize("note", ["", "{", '{"checkpoint": "../other", "loss": 1}', '{"checkpoint": 3, "loss": "x"}'])
def test_a_damaged_note_of_the_best_is_written_again_from_the_checkpoints(
    tmp_path, cache_folder, dev_teacher, t5_config, whole_run, note
):
    run = tmp_path / "cut"
    shutil.copytree(whole_run["cut"], run)
    (run / "best.json").write_text(note)
    heard = Listening()
    run_training(run, cache_folder, dev_teacher, t5_config, progress=heard, **whole_run["flags"])
    assert any(line.startswith(f"{run}/best.json is not as `secondcast train` wrote") for line in heard.heard)
    assert (run / "best.json").read_bytes() == (whole_run["whole"] / "best.json").read_bytes()


def test_while_the_best_is_not_known_no_checkpoint_is_deleted(tmp_path, whole_run):
    run = tmp_path / "whole"
    shutil.copytree(whole_run["whole"], run)
    shutil.copytree(whole_run["cut"], run, dirs_exist_ok=True)
    (run / "best.json").write_text("")
    before = names(run)
    delete_old_checkpoints(checkpoints(run)[-1], 1)
    assert names(run) == before == {f"checkpoint-{step:08d}" for step in (2, 4, 6)}


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_the_files_of_a_checkpoint_have_the_usual_permissions(tmp_path, cache_folder, dev_teacher, t5_config, umask):
    before = os.umask(umask)
    try:
        run_training(tmp_path / "run", cache_folder, dev_teacher, t5_config, steps=1, ema_decay=0.5)
    finally:
        os.umask(before)
    files = [file for file in (tmp_path / "run").rglob("*") if file.is_file()]
    assert {oct(file.stat().st_mode & 0o777) for file in files} == {oct(0o666 & ~umask)}
    assert {"optimizer.safetensors", "trained.safetensors", "model.safetensors"} <= {file.name for file in files}


@pytest.mark.thorough
def test_no_space_for_a_checkpoint_is_one_line_and_the_run_goes_on_later(
    tmp_path, cache_folder, dev_teacher, t5_config, whole_run
):
    shutil.copytree(whole_run["cut"], tmp_path / "cut")
    weights_bytes = (checkpoints(tmp_path / "cut")[-1] / "student/model.safetensors").stat().st_size
    with no_file_above(weights_bytes // 2), pytest.raises(RunError) as raised:
        run_training(tmp_path / "cut", cache_folder, dev_teacher, t5_config, **whole_run["flags"])
    said = str(raised.value)
    assert said.startswith(f"{tmp_path / 'cut'}/checkpoint-00000006 cannot be written (") and "File too large" in said
    assert said.endswith(
        "free disk space (or fix the cause) and run the same command again to resume from the last of them"
    )
    assert "\n" not in said and not list((tmp_path / "cut").glob(".*"))
    assert names(tmp_path / "cut") == {"checkpoint-00000002", "checkpoint-00000004"}
    run_training(tmp_path / "cut", cache_folder, dev_teacher, t5_config, **whole_run["flags"])
    assert same_weights(tmp_path / "cut", whole_run["whole"])


def test_what_a_killed_run_left_is_swept_and_the_mark_of_the_best_made_up_for(
    tmp_path, cache_folder, dev_teacher, t5_config, whole_run
):
    shutil.copytree(whole_run["whole"], tmp_path / "run")
    best = best_of(tmp_path / "run")
    state = json.loads((checkpoints(tmp_path / "run")[-1] / "state.json").read_bytes())
    assert state["is_best"], "the last checkpoint is the best here: what follows needs that"
    (tmp_path / "run/best.json").unlink()
    shutil.copytree(checkpoints(tmp_path / "run")[-1], tmp_path / "run/.checkpoint-00000006.77.tmp")
    run_training(tmp_path / "run", cache_folder, dev_teacher, t5_config, **whole_run["flags"])
    assert best_of(tmp_path / "run") == best
    assert not list((tmp_path / "run").glob(".*"))


@pytest.mark.thorough
def test_a_configuration_that_cannot_be_read_is_one_line(tmp_path, cache_folder, dev_teacher, t5_config):
    run_training(tmp_path / "run", cache_folder, dev_teacher, t5_config)
    file = tmp_path / "run/config.json"
    config = json.loads(file.read_bytes())
    del config["caches"]
    file.write_text(json.dumps(config))
    with pytest.raises(RunError, match=rf"^{file} cannot be read \(caches is missing.*new run folder$") as caught:
        run_training(tmp_path / "run", cache_folder, dev_teacher, t5_config)
    assert "\n" not in str(caught.value)


@pytest.mark.thorough
def test_how_many_checkpoints_are_kept_may_change_what_shapes_weights_may_not(
    tmp_path, cache_folder, dev_teacher, t5_config
):
    run_training(tmp_path / "run", cache_folder, dev_teacher, t5_config)
    run_training(tmp_path / "run", cache_folder, dev_teacher, t5_config, keep_checkpoints=5)
    with pytest.raises(RunError, match="was started with grad-accum-steps = 1, not 2: the weights depend on it"):
        run_training(tmp_path / "run", cache_folder, dev_teacher, t5_config, grad_accum_steps=2)
    with pytest.raises(RunError, match="was started with ema-decay = None, not 0.9"):
        run_training(tmp_path / "run", cache_folder, dev_teacher, t5_config, ema_decay=0.9)


@pytest.mark.thorough
def test_the_average_goes_on_where_it_was(tmp_path, cache_folder, dev_teacher, t5_config, whole_run):
    shutil.copytree(whole_run["cut"], tmp_path / "cut")
    run_training(tmp_path / "cut", cache_folder, dev_teacher, t5_config, **whole_run["flags"])
    averages = [load_student(checkpoints(run)[-1] / "student") for run in (tmp_path / "cut", whole_run["whole"])]
    one, other = (student.state_dict() for student in averages)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.thorough
def test_an_observer_is_called_at_the_start_after_each_step_and_after_its_checkpoint(
    tmp_path, cache_folder, dev_teacher, t5_config
):
    seen = []

    class Watching(Observer):
        def on_start(self, trainer):
            seen.append(("start", trainer.done))

        def on_step(self, trainer):
            seen.append(("step", trainer.done))

        def on_checkpoint(self, run, step):
            seen.append((checkpoints(run)[-1].name, step))

    run_training(tmp_path / "run", cache_folder, dev_teacher, t5_config, steps=4, observers=[Watching()])
    first = [("start", 0), ("step", 1), ("step", 2), ("checkpoint-00000002", 2)]
    assert seen == [*first, ("step", 3), ("step", 4), ("checkpoint-00000004", 4)]


def test_each_validation_is_a_line_with_the_lowest_so_far(tmp_path, cache_folder, dev_teacher, t5_config, monkeypatch):
    losses = iter([0.5, 0.25, 0.75])
    monkeypatch.setattr(Trainer, "validate", lambda trainer, done: next(losses))
    heard = Listening()
    run_training(tmp_path / "run", cache_folder, dev_teacher, t5_config, keep_checkpoints=1, progress=heard)
    assert [line for line in heard.heard if line.startswith("step ")] == [
        "step 2: validation loss 0.5, the lowest so far; checkpoint-00000002 is kept as the best",
        "step 4: validation loss 0.25, the lowest so far; checkpoint-00000004 is kept as the best",
        "step 6: validation loss 0.75, the lowest is 0.25 at step 4; checkpoint-00000006 is kept until the next",
    ]
    assert names(tmp_path / "run") == {"checkpoint-00000004", "checkpoint-00000006"}
    (tmp_path / "run/best.json").write_text("{")
    assert validation_text(tmp_path / "run/checkpoint-00000006", 0.75, 0.25, 2) == (
        "step 6: validation loss 0.75, the lowest is 0.25; checkpoint-00000006 is kept among the last 2"
    )

"""Checkpoints: the last ones and the best are kept, damage is found, a full disk loses nothing, old runs go on."""

import json
import re
import resource
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from secondcast.models.student.student import checkpoints, load_student, student_folder
from secondcast.storage_schemas.errors import BadRun
from tests.trainer.test_train import Listening, StopAfter, run_training, same_weights


def names(run: Path) -> set[str]:
    return {folder.name for folder in checkpoints(run)}


def best_of(run: Path) -> str:
    return str(json.loads((run / "best.json").read_text())["checkpoint"])


@pytest.mark.parametrize(("keep", "last"), [(1, {8}), (3, {4, 6, 8})])
def test_the_last_checkpoints_and_the_best_are_kept(tmp_path, cache_folder, dev_teacher, t5_config, keep, last):
    run_training(tmp_path / "run", cache_folder, dev_teacher, t5_config, steps=8, keep=keep)
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
    assert said.startswith(f"{newest} cannot be read (") and said.endswith("): going back to the checkpoint before it")
    assert re.search(reason, said)
    assert f"going on from step {int(older.name[-8:])}" in heard.heard
    assert same_weights(tmp_path / "cut", whole_run["whole"])


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, cache_folder, dev_teacher, t5_config):
    """A run of six steps, and the same one stopped after five."""
    folder, flags = tmp_path_factory.mktemp("runs"), {"ema": 0.5}
    run_training(folder / "whole", cache_folder, dev_teacher, t5_config, **flags)
    with pytest.raises(KeyboardInterrupt):
        run_training(folder / "cut", cache_folder, dev_teacher, t5_config, progress=StopAfter(5), **flags)
    assert names(folder / "cut") == {"checkpoint-00000002", "checkpoint-00000004"}
    return {"whole": folder / "whole", "cut": folder / "cut", "flags": flags}


def test_without_one_readable_checkpoint_it_begins_again_and_says_so(
    tmp_path, cache_folder, dev_teacher, t5_config, whole_run
):
    shutil.copytree(whole_run["cut"], tmp_path / "cut")
    for folder in checkpoints(tmp_path / "cut"):
        flip(folder / "optimizer.safetensors")
    heard = Listening()
    run_training(tmp_path / "cut", cache_folder, dev_teacher, t5_config, progress=heard, **whole_run["flags"])
    assert f"none of the 2 checkpoints of {tmp_path / 'cut'} can be read: beginning again from step 0" in heard.heard
    assert same_weights(tmp_path / "cut", whole_run["whole"])


@contextmanager
def no_file_above(bytes_: int):
    """The system refuses to write beyond so many bytes of a file, as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_no_space_for_a_checkpoint_is_one_line_and_the_run_goes_on_later(
    tmp_path, cache_folder, dev_teacher, t5_config, whole_run
):
    shutil.copytree(whole_run["cut"], tmp_path / "cut")
    weights_bytes = (checkpoints(tmp_path / "cut")[-1] / "student/model.safetensors").stat().st_size
    with no_file_above(weights_bytes // 2), pytest.raises(BadRun) as raised:
        run_training(tmp_path / "cut", cache_folder, dev_teacher, t5_config, **whole_run["flags"])
    said = str(raised.value)
    assert said.startswith(f"{tmp_path / 'cut'}/checkpoint-00000006 cannot be written (") and "File too large" in said
    assert said.endswith("make room (or mend that) and give the same command again, it goes on from the last of them")
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


def test_a_configuration_that_cannot_be_read_is_one_line(tmp_path, cache_folder, dev_teacher, t5_config):
    run_training(tmp_path / "run", cache_folder, dev_teacher, t5_config)
    file = tmp_path / "run/config.json"
    config = json.loads(file.read_bytes())
    del config["caches"]
    file.write_text(json.dumps(config))
    with pytest.raises(BadRun, match=rf"^{file} cannot be read \(caches: Field required .*new run folder$") as caught:
        run_training(tmp_path / "run", cache_folder, dev_teacher, t5_config)
    assert "\n" not in str(caught.value)


def test_how_many_checkpoints_are_kept_may_change_what_shapes_weights_may_not(
    tmp_path, cache_folder, dev_teacher, t5_config
):
    run_training(tmp_path / "run", cache_folder, dev_teacher, t5_config)
    run_training(tmp_path / "run", cache_folder, dev_teacher, t5_config, keep=5)
    with pytest.raises(BadRun, match="was begun with accumulate = 1, you asked for 2: the weights depend on it"):
        run_training(tmp_path / "run", cache_folder, dev_teacher, t5_config, accumulate=2)
    with pytest.raises(BadRun, match="was begun with ema = None, you asked for 0.9"):
        run_training(tmp_path / "run", cache_folder, dev_teacher, t5_config, ema=0.9)


def test_the_average_goes_on_where_it_was(tmp_path, cache_folder, dev_teacher, t5_config, whole_run):
    shutil.copytree(whole_run["cut"], tmp_path / "cut")
    run_training(tmp_path / "cut", cache_folder, dev_teacher, t5_config, **whole_run["flags"])
    averages = [load_student(checkpoints(run)[-1] / "student") for run in (tmp_path / "cut", whole_run["whole"])]
    one, other = (student.state_dict() for student in averages)
    assert all(torch.equal(one[name], other[name]) for name in one)

"""One training in a run folder at a time: what it wrote down stays."""

import errno
import fcntl
import os
import re
import shutil
from contextlib import nullcontext

import pytest

from secondcast.models.student.folder import checkpoints
from secondcast.storage_schemas.errors import RunError, StorageError
from secondcast.storage_schemas.progress import Silent
from secondcast.trainer.preparing import loading
from secondcast.trainer.run.folder import lock_run
from tests.trainer.conftest import cache_folder, t5_config
from tests.trainer.test_train import run_training, same_weights

__all__ = ["cache_folder", "t5_config"]


@pytest.mark.thorough
def test_the_second_of_two_trainings_in_one_folder_is_refused(tmp_path, cache_folder, dev_teacher, t5_config):
    class Meddling(Silent):
        """Begins the same run again while it runs."""

        refused = ""

        def bar(self, title, **counts):
            with pytest.raises(RunError) as caught:
                run_training(tmp_path / "run", cache_folder, dev_teacher, t5_config)
            self.refused = str(caught.value)
            return nullcontext(self)

    meddling = Meddling()
    run_training(tmp_path / "run", cache_folder, dev_teacher, t5_config, progress=meddling)
    assert meddling.refused == (
        f"another process trains in {tmp_path / 'run'}, and two would overwrite each other's checkpoints: wait for it, "
        "or give another folder"
    )
    run_training(tmp_path / "whole", cache_folder, dev_teacher, t5_config)
    assert same_weights(tmp_path / "run", tmp_path / "whole")


def test_a_run_that_another_one_begins_keeps_what_it_wrote_down(tmp_path, cache_folder, dev_teacher, t5_config):
    run = tmp_path / "run"
    with lock_run(run), pytest.raises(RunError, match="another process trains in"):
        run_training(run, cache_folder, dev_teacher, t5_config)
    assert [path.name for path in run.iterdir()] == ["lock"]
    run_training(run, cache_folder, dev_teacher, t5_config)
    assert checkpoints(run)


def test_a_run_that_began_while_another_one_loaded_is_not_begun_again(
    tmp_path, cache_folder, dev_teacher, t5_config, monkeypatch
):
    real = loading._load_backbone

    def slow(*arguments):
        monkeypatch.setattr(loading, "_load_backbone", real)
        run_training(tmp_path / "run", cache_folder, dev_teacher, t5_config)
        return real(*arguments)

    monkeypatch.setattr(loading, "_load_backbone", slow)
    message = f"another process has started to train in {tmp_path / 'run'}: give the same command again to resume it"
    with pytest.raises(RunError, match=re.escape(message)):
        run_training(tmp_path / "run", cache_folder, dev_teacher, t5_config)


def test_a_model_folder_is_not_begun_as_a_run(tmp_path, cache_folder, dev_teacher, t5_config):
    model = tmp_path / "model"
    shutil.copytree(t5_config, model)
    (model / "model.safetensors").write_bytes(b"weights")
    before = {file.name: file.read_bytes() for file in model.iterdir()}
    with pytest.raises(
        RunError, match=rf"^{model}/config.json cannot be read \(.*\): it is damaged, or of another version"
    ) as got:
        run_training(model, cache_folder, dev_teacher, t5_config)
    assert "\n" not in str(got.value) and {file.name: file.read_bytes() for file in model.iterdir()} == before


def test_on_a_file_system_without_locks_a_run_is_refused(tmp_path, cache_folder, dev_teacher, t5_config, monkeypatch):
    def refuses(*_):
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(fcntl, "flock", refuses)
    with pytest.raises(
        StorageError, match=rf"^{tmp_path}/run is on a file system without locks \(flock: Operation not su"
    ):
        run_training(tmp_path / "run", cache_folder, dev_teacher, t5_config)

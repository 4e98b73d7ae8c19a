"""A student's digest is of all that its embeddings depend on; what earlier versions noted is still known."""

import json
import shutil

import pytest

from secondcast.evaluation.pictures.folder import PictureFolder, PictureSettings
from secondcast.evaluation.text_encoder import student_digest, weights_digest
from secondcast.storage_schemas.errors import SettingsMismatchError


@pytest.fixture
def copy(tmp_path, student):
    return shutil.copytree(student, tmp_path / "copy")


def test_the_digest_of_a_student_changes_with_its_configuration_and_its_tokenizer(copy, student):
    known = student_digest(student)
    assert student_digest(copy) == known
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"dropout_rate": 0.125}))
    changed = student_digest(copy)
    (copy / "tokenizer.json").write_text("{}")
    assert len({known, changed, student_digest(copy)}) == 3
    assert weights_digest(copy) == weights_digest(student)


def test_the_digest_of_a_student_does_not_depend_on_layout_or_the_program_that_wrote_it(copy, student):
    config = json.loads((copy / "config.json").read_text())
    config = dict(reversed((config | {"transformers_version": "0.0"}).items()))
    (copy / "config.json").write_text(json.dumps(config, indent=7))
    (copy / "README.md").write_text("")
    assert student_digest(copy) == student_digest(student)


def test_pictures_of_an_earlier_version_are_gone_on_with(tmp_path):
    def asked(student: str) -> PictureSettings:
        return PictureSettings(
            student=student, teacher="t", text_length=4, height=16, width=16, steps=2, schedule="diffusers",
            guidance=None, seed=0, dtype="float32", pooled="zero",
        )  # fmt: skip

    PictureFolder.open(tmp_path, asked("weights"), ["a"])
    assert PictureFolder.open(tmp_path, asked("whole"), ["a"], earlier_digest="weights").missing == [0]
    with pytest.raises(SettingsMismatchError, match="has images made with student = weights, requested whole"):
        PictureFolder.open(tmp_path, asked("whole"), ["a"], earlier_digest="others")

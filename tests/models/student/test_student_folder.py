"""Students are known by their kind without the modules of their networks."""

import pytest

from secondcast.models.student.encoder_student_network import EncoderStudentConfig
from secondcast.models.student.folder import STUDENT_KINDS, student_folder
from secondcast.models.student.student_network import StudentConfig
from secondcast.storage_schemas.errors import StudentError


def test_the_kinds_of_students_are_those_of_their_configurations():
    assert (StudentConfig.model_type, EncoderStudentConfig.model_type) == STUDENT_KINDS


@pytest.mark.parametrize("written", ["", "{", "[1]", "{}"])
def test_a_note_of_the_best_checkpoint_that_cannot_be_read_is_one_line(tmp_path, written):
    (tmp_path / "checkpoint-00000001/student").mkdir(parents=True)
    assert student_folder(tmp_path) == tmp_path / "checkpoint-00000001/student"
    (tmp_path / "best.json").write_text(written)
    with pytest.raises(StudentError) as raised:
        student_folder(tmp_path)
    assert str(raised.value) == (
        f"{tmp_path}/best.json is not as `secondcast train` wrote it, so the best checkpoint is unknown: delete it to "
        "use the last one, or give a checkpoint's student/ folder"
    )

"""Students are known by their kind without the modules of their networks."""

from models.encoder_student_network import EncoderStudentConfig
from models.student_folder import STUDENT_KINDS
from models.student_network import StudentConfig


def test_the_kinds_of_students_are_those_of_their_configurations():
    assert (StudentConfig.model_type, EncoderStudentConfig.model_type) == STUDENT_KINDS

"""Text encoders under the names that tables print."""

from pathlib import Path

import torch

from evaluation.sampling import Embed
from models.student import check_fits, load_student, student_folder, untrained_like
from models.student_network import UnderstudyStudent
from models.teacher_folder import TeacherFolder
from models.text_encoder import TeacherTextEncoder
from storage_schemas.errors import BadStudent


def teacher_and_students(
    student: Path, teacher: TeacherFolder, *, dtype: torch.dtype, device: torch.device, seed: int
) -> dict[str, Embed]:
    """teacher, student, and untrained: the student's shape with random weights. BadStudent if it does not fit."""
    trained = load_student(student_folder(student)).to(device)
    width = int(teacher.config("transformer")["joint_attention_dim"])
    check_fits(trained, width, str(student))
    if trained.config.text_length != teacher.text_length:
        raise BadStudent(
            f"{student} was trained at {trained.config.text_length} text tokens, this teacher has "
            f"{teacher.text_length}: score it on the teacher it was trained for"
        )
    untrained = untrained_like(trained, seed=seed).to(device)
    encoder = TeacherTextEncoder.load(teacher, dtype=dtype, device=device)
    return {"teacher": encoder.encode, "student": _embed(trained), "untrained": _embed(untrained)}


def _embed(student: UnderstudyStudent) -> Embed:
    return lambda token_ids_BT: student(token_ids_BT)[0]

"""Text encoders under the names that tables print."""

from pathlib import Path

import torch

from evaluation.sampling import Embed, OwnTokensEmbed
from models.student import Student, check_fits, load_student, student_folder, untrained_like
from models.student_tokens import StudentTokens, own_tokens
from models.teacher_folder import TeacherFolder
from models.text_encoder import TeacherTextEncoder
from storage_schemas.errors import BadStudent


def teacher_and_students(
    student: Path, teacher: TeacherFolder, *, dtype: torch.dtype, device: torch.device, seed: int
) -> dict[str, Embed]:
    """teacher, student, and untrained: the student's shape with random weights. BadStudent if it does not fit."""
    folder = student_folder(student)
    trained = load_student(folder).to(device)
    tokens = own_tokens(folder, trained)
    width = int(teacher.config("transformer")["joint_attention_dim"])
    check_fits(trained, width, str(student))
    # A student with a tokenizer of its own may have positions for fewer tokens than the teacher.
    own, taught = trained.config.text_length, teacher.text_length
    if own > taught or (own < taught and tokens is None):
        raise BadStudent(
            f"{student} was trained at {trained.config.text_length} text tokens, this teacher has "
            f"{teacher.text_length}: score it on the teacher it was trained for"
        )
    untrained = untrained_like(trained, seed=seed).to(device)
    encoder = TeacherTextEncoder.load(teacher, dtype=dtype, device=device)
    return {"teacher": encoder.encode, "student": _embed(trained, tokens), "untrained": _embed(untrained, tokens)}


def _embed(student: Student, tokens: StudentTokens | None) -> Embed:
    def embed(token_ids_BT: torch.Tensor) -> torch.Tensor:
        embedding_BTD: torch.Tensor = student(token_ids_BT)[0]
        return embedding_BTD

    return embed if tokens is None else OwnTokensEmbed(embed=embed, token_ids=tokens.batch)

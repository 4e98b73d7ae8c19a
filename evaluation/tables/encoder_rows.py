"""The text encoders of a table: the teacher's own, the same in 8 bits, and students."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from secondcast.evaluation.sampling import OwnTokensEmbed
from secondcast.evaluation.settings.generating import TEACHER
from secondcast.evaluation.text_encoder import open_text_encoder
from secondcast.models.memory.meta_run import parameter_count
from secondcast.models.memory.options import TextQuantization
from secondcast.models.memory.quantized import held_bytes, quantize_text_encoder
from secondcast.models.student.folder import weight_bytes
from secondcast.models.teacher.folder import TeacherFolder
from secondcast.models.teacher.text_encoder import TeacherTextEncoder
from secondcast.storage_schemas.schema.fields import Array

EIGHT_BITS = "teacher, 8 bit"
_NAMES: dict[TextQuantization | None, str] = {None: TEACHER, "int8": EIGHT_BITS, "nf4": "teacher, 4 bit"}


@dataclass(frozen=True, kw_only=True)
class EncoderRow:
    """A text encoder with its name in tables; `digest` covers everything that its embeddings depend on.

    weight_bytes: of its weight files; for one that is quantized when it is loaded, of its weights in memory.
    """

    name: str
    parameters: int
    weight_bytes: int
    digest: str
    embed: OwnTokensEmbed

    @torch.no_grad()
    def embeddings(self, texts: Sequence[str], device: torch.device) -> Array:
        """Mean over the tokens of each text's embedding, fp32 [N, D], comparable across text lengths."""
        parts = [self.embed(self.embed.token_ids([text]).to(device)).float().mean(1) for text in texts]
        found: Array = torch.cat(parts).cpu().numpy()
        return found


def teacher_row(
    teacher: TeacherFolder,
    *,
    quantize: TextQuantization | None = None,
    text_length: int | None = None,
    dtype: torch.dtype,
    device: torch.device,
) -> EncoderRow:
    """The large text encoder of a teacher's folder; quantize: with linears in 8 or 4 bits.

    That saves memory without a student: the paper discusses it as the alternative. MissingExtraError.
    """
    leader = open_text_encoder(TEACHER, teacher, text_length=text_length, dtype=dtype, device=device, quantize=quantize)
    encoder = TeacherTextEncoder.load(teacher, dtype=dtype, device=device)
    parameters = parameter_count(encoder.model)
    if quantize is not None:
        quantize_text_encoder(encoder.model, quantize)
    on_disk = weight_bytes(teacher.part("large_text_encoder"))
    return EncoderRow(
        name=_NAMES[quantize],
        parameters=parameters,
        weight_bytes=on_disk if quantize is None else held_bytes(encoder.model),
        digest=leader.digest,
        embed=OwnTokensEmbed(embed=encoder.encode, token_ids=leader.token_ids),
    )


def student_row(name: str, student: Path, teacher: TeacherFolder, *, device: torch.device) -> EncoderRow:
    """Load the student of a run or an export with its training text length. StudentError if it does not match."""
    # A folder named `teacher` is a student here, and Path drops the "./" that marks it.
    where = f"./{student}" if str(student) == TEACHER else str(student)
    leader = open_text_encoder(where, teacher, text_length=None, dtype=torch.float32, device=device)
    assert leader.parameters is not None and leader.weight_bytes is not None
    return EncoderRow(
        name=name,
        parameters=leader.parameters,
        weight_bytes=leader.weight_bytes,
        digest=leader.digest,
        embed=OwnTokensEmbed(embed=leader.embed, token_ids=leader.token_ids),
    )

"""What initial students of the pocket teacher are made of in tests."""

import json
from functools import cache
from pathlib import Path

import torch

from secondcast.models.student.initial.encoder_weights import EncoderWeights
from secondcast.models.student.initial.initial_student import Maker, TeacherEncoder, TokenIds
from secondcast.models.student.initial.size import Size
from secondcast.models.student.initial.work_folder import WorkFolder
from secondcast.models.student.student import save_student
from secondcast.models.teacher.context_projection import find_context_projection
from secondcast.models.teacher.folder import find_teacher, part_source
from secondcast.models.teacher.text_encoder import TeacherTextEncoder
from secondcast.pocket import STUDENTS_FOLDER, TEACHER_FOLDER
from secondcast.pocket.world import captions
from secondcast.storage_schemas.progress import Progress, Silent

SETTINGS = {"teacher": "pocket"}
_SILENT = Silent()


@cache
def pocket_encoder() -> TeacherEncoder:
    """The pocket teacher's encoder in fp32, loaded once."""
    folder = find_teacher(str(TEACHER_FOLDER), ("large_text_encoder", "large_tokenizer"))
    part = folder.part("large_text_encoder")
    model = TeacherTextEncoder.load(folder, dtype=torch.float32, device=torch.device("cpu")).model
    return TeacherEncoder(
        identity=folder.identity(text_length=folder.text_length, hashed=False),
        load=lambda: model,
        weights=EncoderWeights.open(part, folder.config("large_text_encoder"), part_source(part)),
        context_ID=find_context_projection(str(TEACHER_FOLDER), None).context_ID,
    )


@cache
def pocket_ids(fitted: int, held: int) -> TokenIds:
    """Token ids of captions of the pocket's world."""
    folder = find_teacher(str(TEACHER_FOLDER), ())
    texts = captions(fitted + held, seed=0, split="train")
    rows = folder.family.tokenizer(folder.part("large_tokenizer")).token_ids(texts)
    ids_NT = torch.tensor([[*ids, *[0] * (folder.text_length - len(ids))] for ids in rows])
    return TokenIds(fitted_NT=ids_NT[:fitted], held_NT=ids_NT[fitted:])


def pocket_size(name: str) -> Size:
    """The size of an embedded student."""
    config = json.loads((STUDENTS_FOLDER / name / "config.json").read_text())
    return Size.of_student(config, pocket_encoder().weights.config)


def maker_in(work: WorkFolder, size: Size, ids: TokenIds, *, kind: str = "cut", progress: Progress = _SILENT) -> Maker:
    """A maker of initial students of the pocket teacher."""
    return Maker(pocket_encoder(), size, ids, work, kind=kind, batch_size=16, progress=progress)


def make_in(out: Path, ids: TokenIds, progress: Progress = _SILENT) -> bytes:
    """Cut a `pocket-tiny` into OUT as the command does; the bytes of its weights."""
    work = WorkFolder(out)
    with work.opened(SETTINGS):
        _, best = maker_in(work, pocket_size("tiny"), ids, progress=progress).make(None)
        with work.student() as folder:
            save_student(best.student, folder, tokenizer=None)
    return (out / "model.safetensors").read_bytes()

"""Check the weights of a teacher against its classes, from the headers of their files, before any work."""

from collections.abc import Sequence

from diffusers import AutoencoderKL, FluxTransformer2DModel
from transformers import CLIPTextModel, T5EncoderModel

from secondcast.models.teacher.folder import TeacherFolder, part_source
from secondcast.models.weights.checked_loading import check_weights

_CLASSES = {
    "transformer": FluxTransformer2DModel,
    "text_encoder_2": T5EncoderModel,
    "text_encoder": CLIPTextModel,
    "vae": AutoencoderKL,
}


def check_teacher_weights(teacher: TeacherFolder, parts: Sequence[str]) -> None:
    """Raise TeacherError unless these parts of a teacher can be loaded; parts without weights pass."""
    for part in parts:
        if (kind := _CLASSES.get(part)) is not None:
            folder = teacher.part(part)
            check_weights(kind, folder, part_source(folder))

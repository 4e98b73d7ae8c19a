"""The backbone's own text projection: the one linear through which FLUX sees a text embedding."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from models.teacher_folder import TeacherFolder
from storage_schemas.digests import weight_sha256
from storage_schemas.errors import BadTeacher
from storage_schemas.manifest import Teacher

WEIGHT = "context_embedder.weight"
_WHOLE_FILE = "diffusion_pytorch_model.safetensors"
_INDEX_FILE = f"{_WHOLE_FILE}.index.json"


def load_context_projection(folder: TeacherFolder, recorded: Teacher, device: torch.device) -> torch.Tensor:
    """context_ID, fp32: the weight of `context_embedder`, from text width D to the transformer's inner width I.

    Reads that tensor alone. BadTeacher if its file is not the one that the cache was recorded with (by sha256).
    """
    file = _file_of(folder, WEIGHT)
    name = f"transformer/{file.name}"
    try:
        found, expected = weight_sha256(file), recorded.weights.get(name)
        if found != expected:
            raise BadTeacher(
                f"{file} has sha256 {found[:16]}, the cache was recorded with {str(expected)[:16]}: another model; "
                f"give the recorded one with --backbone"
            )
        with safe_open(file, framework="pt") as tensors:
            weight_ID: torch.Tensor = tensors.get_tensor(WEIGHT)
    except (OSError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise BadTeacher(f"{WEIGHT} cannot be read from {file} ({reason}): download transformer/ again") from error
    return weight_ID.to(device=device, dtype=torch.float32)


def _file_of(folder: TeacherFolder, key: str) -> Path:
    part = folder.part("transformer")
    index = part / _INDEX_FILE
    if not index.is_file():
        return part / _WHOLE_FILE
    try:
        return part / str(json.loads(index.read_bytes())["weight_map"][key])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadTeacher(
            f"{index} does not say where {key} lies, expected the index of a FLUX transformer: download it again"
        ) from error

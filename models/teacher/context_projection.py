"""The backbone's text projection: the one linear through which it reads a text embedding."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from secondcast.models.teacher.folder import REPLAY_PARTS, TeacherFolder, find_teacher, part_source
from secondcast.models.teacher.hub import download
from secondcast.models.teacher.hub_tensor import HubFile
from secondcast.models.weights.checked_loading import read_tensor
from secondcast.models.weights.files import CheckpointSource
from secondcast.storage_schemas.errors import TeacherError, reason
from secondcast.storage_schemas.io.digests import weight_sha256
from secondcast.storage_schemas.schema.manifest import Teacher

_FLOATING = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_WHOLE_FILE = "diffusion_pytorch_model.safetensors"
_INDEX_FILE = f"{_WHOLE_FILE}.index.json"


@dataclass(frozen=True, kw_only=True)
class ContextProjection:
    """context_ID of a teacher, fp32, on the CPU; `source` is the name as given (see TeacherFolder)."""

    context_ID: torch.Tensor
    source: str


def find_context_projection(name: str, recorded: Teacher | None, *, revision: str | None = None) -> ContextProjection:
    """The text projection of a teacher by folder, hub name or NAME@REVISION.

    From the hub only that tensor is read, at one commit, unless its file is already downloaded. The sha256 that the hub
    states for the file must be the recorded one; None: there is no recording to compare with. Raises TeacherError.
    """
    folder = find_teacher(name, REPLAY_PARTS, revision=revision, files=("config.json", _INDEX_FILE))
    entry = folder.family.anatomy.text_entry
    file = _file_of(folder, entry)
    if folder.commit is None or file.is_file():
        context_ID = load_context_projection(folder, recorded, torch.device("cpu"))
    else:
        context_ID = _fetch(folder, folder.commit, f"{file.parent.name}/{file.name}", recorded)
    return ContextProjection(context_ID=context_ID, source=folder.source)


def load_context_projection(folder: TeacherFolder, recorded: Teacher | None, device: torch.device) -> torch.Tensor:
    """context_ID, fp32: the weight of the text entry, from text width D to the transformer's inner width I.

    Only reads that tensor. TeacherError if its file is not the one that the cache was recorded with (by sha256); None:
    there is no recording.
    """
    entry = folder.family.anatomy.text_entry
    file = _file_of(folder, entry)
    source = part_source(file.parent)
    try:
        if recorded is not None:
            _check_recorded(str(file), weight_sha256(file), recorded.weights.get(f"{file.parent.name}/{file.name}"))
    except OSError as error:
        why = error.strerror or reason(error)
        raise source.refused(f"{entry} cannot be read from {file.name} ({why})") from error
    weight_ID = _checked(read_tensor(file, entry, source), entry, _text_width(folder, recorded), source)
    return weight_ID.to(device=device, dtype=torch.float32)


def _text_width(folder: TeacherFolder, recorded: Teacher | None) -> int:
    return folder.family.text_width(folder.config("transformer")) if recorded is None else recorded.text_width


def _fetch(folder: TeacherFolder, commit: str, path: str, recorded: Teacher | None) -> torch.Tensor:
    entry = folder.family.anatomy.text_entry
    try:
        file = HubFile.find(folder.source, path, commit)
        if file.sha256 is not None:
            if recorded is not None:
                _check_recorded(f"{path} of {folder.pinned_source}", file.sha256, recorded.weights.get(path))
            source, width = part_source(folder.path / "transformer"), _text_width(folder, recorded)
            return _checked(file.tensor(entry), entry, width, source).float()
    except TeacherError:
        raise
    except Exception as error:
        raise TeacherError(
            f"{entry} cannot be read from {path} of {folder.pinned_source} ({type(error).__name__}): check the "
            f"network, or download the file with `hf download {folder.source} {path} --revision {commit}`"
        ) from error
    download(folder.source, [path], commit)
    return load_context_projection(folder, recorded, torch.device("cpu"))


def _checked(weight_ID: torch.Tensor, entry: str, width: int, source: CheckpointSource) -> torch.Tensor:
    if weight_ID.dtype not in _FLOATING or weight_ID.ndim != 2 or weight_ID.shape[1] != width:
        raise source.refused(
            f"{entry} is {str(weight_ID.dtype).removeprefix('torch.')} {list(weight_ID.shape)}, expected a "
            f"floating-point matrix with {width} columns, the cache's text width"
        )
    return weight_ID


def _check_recorded(file: str, found: str, expected: str | None) -> None:
    if found != expected:
        raise TeacherError(
            f"{file} has sha256 {found[:16]}, but the cache was recorded with {str(expected)[:16]}, another model: "
            "give the recorded one with --backbone"
        )


def _file_of(folder: TeacherFolder, key: str) -> Path:
    part = folder.part("transformer")
    index = part / _INDEX_FILE
    if not index.is_file():
        return part / _WHOLE_FILE
    try:
        return part / str(json.loads(index.read_bytes())["weight_map"][key])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TeacherError(
            f"{index} does not list {key}, expected the index of a transformer with it: download it again"
        ) from error

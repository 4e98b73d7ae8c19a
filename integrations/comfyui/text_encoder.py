"""The node, its list of students, and what it accepts.

It needs torch and transformers, which ComfyUI has, and not Secondcast: an export carries the classes of its student.
"""

import json
import logging
from functools import lru_cache
from pathlib import Path
from typing import Any

import folder_paths
import torch
from comfy import model_management
from transformers import AutoModel, AutoTokenizer
from transformers.configuration_utils import PretrainedConfig

FOLDER = "secondcast"
"""Folder of the students within ComfyUI/models, and its name in extra_model_paths.yaml."""
TEXT_WIDTH, POOLED_WIDTH = 4096, 768
"""Of FLUX.1: what its transformer reads of T5-XXL, and of CLIP-L."""
_STUDENTS = ("secondcast_student", "secondcast_encoder_student")
_FAMILIES = ("flux", "flux-kontext")

folder_paths.add_model_folder_path(FOLDER, str(Path(folder_paths.models_dir) / FOLDER))


def students() -> dict[str, Path]:
    """Folders with a config.json in the students' folders, by name."""
    roots = [Path(root) for root in folder_paths.get_folder_paths(FOLDER)]
    return {file.parent.name: file.parent for root in reversed(roots) for file in sorted(root.glob("*/config.json"))}


def check_student(folder: Path) -> None:
    """Raise ValueError unless a folder is the export of a student for FLUX.1 whose code is its own."""
    config = _json(folder / "config.json")
    if config.get("model_type") not in _STUDENTS:
        raise ValueError(
            f"{folder} has model_type {config.get('model_type')!r}, expected {' or '.join(_STUDENTS)}: give a folder "
            f"that `secondcast export --to diffusers` wrote"
        )
    # transformers would read such code from a repository of the hub.
    if foreign := [name for name in config.get("auto_map", {}).values() if "--" in str(name)]:
        raise ValueError(f"{folder} takes its code from elsewhere ({foreign[0]}): give an export as it was written")
    facts = folder / "secondcast.json"
    family = _json(facts).get("family", _FAMILIES[0]) if facts.is_file() else _FAMILIES[0]
    width = config.get("project_out_dim")
    if family not in _FAMILIES or width != TEXT_WIDTH or "hidden_state_layers" in config:
        raise ValueError(
            f"{folder} is a student of {family} with embeddings {width} wide, expected one of FLUX.1, {TEXT_WIDTH} "
            f"wide: this node is for FLUX.1 alone"
        )


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read ({error}): copy the export again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} is no JSON object: copy the export again")
    return found


@lru_cache(maxsize=1)
def _loaded(folder: Path, changed_ns: int) -> tuple[Any, Any]:
    """Student and tokenizer; the last one that was used is kept. changed_ns: see `_changed_ns`."""
    # transformers does not know the model type; the tokenizer's files name its class.
    tokenizer = AutoTokenizer.from_pretrained(
        folder, config=PretrainedConfig(), trust_remote_code=False, local_files_only=True
    )
    student = AutoModel.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True, local_files_only=True)
    return student.eval(), tokenizer


def _changed_ns(folder: Path) -> int:
    """The newest time of its files, in nanoseconds: an update may change the weights alone."""
    return max((file.stat().st_mtime_ns for file in folder.iterdir() if file.is_file()), default=0)


def embedding_of(text: str, student: Any, tokenizer: Any) -> torch.Tensor:
    """[1, T, TEXT_WIDTH] of a prompt, T being the number of tokens that the student was trained at."""
    length = student.config.text_length
    ids_1T = tokenizer(
        text, padding="max_length", max_length=length, truncation=True, return_tensors="pt", verbose=False
    ).input_ids
    if len(tokenizer(text, verbose=False).input_ids) > length:
        logging.warning("Secondcast: the prompt is cut to the %d tokens that this student was trained at", length)
    device = model_management.text_encoder_device()
    if torch.device(device).type != "cpu":
        size = sum(part.numel() * part.element_size() for part in (*student.parameters(), *student.buffers()))
        model_management.free_memory(size, device)
    try:
        with torch.no_grad():
            embedding_1TD = student.to(device)(ids_1T.to(device)).last_hidden_state
    finally:
        student.to(model_management.text_encoder_offload_device())
    return embedding_1TD.to(model_management.intermediate_device())


def pooled_of(text: str, clip: Any) -> torch.Tensor:
    """[1, POOLED_WIDTH] of a prompt by CLIP-L; zeros without one."""
    if clip is None:
        return torch.zeros(1, POOLED_WIDTH, device=model_management.intermediate_device())
    # FLUX.1 reads CLIP's pooled output before its text projection.
    _, pooled = clip.encode_from_tokens(clip.tokenize(text), return_pooled="unprojected")
    if pooled is None or pooled.shape[-1] != POOLED_WIDTH:
        found = "none" if pooled is None else f"one {pooled.shape[-1]} wide"
        raise ValueError(f"clip has a pooled output {POOLED_WIDTH} wide in FLUX.1, found {found}: load clip_l")
    return pooled


class SecondcastTextEncoder:
    """Encodes a prompt by a student in place of T5-XXL."""

    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "encode"
    CATEGORY = "conditioning/secondcast"
    DESCRIPTION = "Encodes a prompt for FLUX.1 by a distilled text encoder, an export in ComfyUI/models/secondcast."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """What the node takes; without clip the pooled output is zero."""
        return {
            "required": {
                "student": (sorted(students()),),
                "text": ("STRING", {"multiline": True, "dynamicPrompts": True}),
            },
            "optional": {"clip": ("CLIP",)},
        }

    @classmethod
    def IS_CHANGED(cls, student: str, text: str, clip: Any = None) -> int:
        """What tells ComfyUI that the student was replaced."""
        folder = students().get(student)
        return 0 if folder is None else _changed_ns(folder)

    def encode(self, student: str, text: str, clip: Any = None) -> tuple[list[list[Any]]]:
        """The conditioning of a prompt; ValueError for a folder that is no student of FLUX.1."""
        found = students()
        if student not in found:
            known = ", ".join(sorted(found)) or "none"
            raise ValueError(f"no student {student!r} in ComfyUI/models/{FOLDER}: found {known}; copy an export there")
        folder = found[student]
        check_student(folder)
        embedding_1TD = embedding_of(text, *_loaded(folder, _changed_ns(folder)))
        return ([[embedding_1TD, {"pooled_output": pooled_of(text, clip)}]],)


NODE_CLASS_MAPPINGS = {"SecondcastTextEncoder": SecondcastTextEncoder}
NODE_DISPLAY_NAME_MAPPINGS = {"SecondcastTextEncoder": "Secondcast Text Encoder"}

"""The format of the published DistillT5 checkpoint: the same tensor names, another class in config.json.

Source: the checkpoint and configuration published with "Scaling Down Text Encoders of Text-to-Image Diffusion
Models" (CVPR 2025), and the ComfyUI node of its authors. The published configuration does not state the text length of
its training; exports add it as `text_length`.
"""

import copy
import json
from pathlib import Path
from typing import Any

import torch

from secondcast.models.student.folder import PUBLISHED_CLASS as PUBLISHED_CLASS
from secondcast.models.student.folder import is_published_form as is_published_form
from secondcast.models.student.student_network import SecondcastStudent, StudentConfig
from secondcast.models.weights.checked_loading import load_checked
from secondcast.models.weights.files import CheckpointSource

WEIGHTS_FILE = "model.safetensors"
# The fixed sizes of the ComfyUI node, and the number of tokens to which it pads at least.
COMFYUI_EXPECTS = {
    "d_model": 768,
    "num_layers": 12,
    "num_heads": 12,
    "d_kv": 64,
    "d_ff": 2048,
    "feed_forward_proj": "gated-gelu",
    "vocab_size": 32128,
    "project_out_dim": 4096,
}
COMFYUI_TEXT_LENGTH = 256

_TIED = "encoder.encoder.embed_tokens.weight"
_NOT_PUBLISHED = ("auto_map", "projection_dropout")
# The published class reads its output width from this key; its configuration file only has project_out_dim.
_WIDTH = "out_dim"
_NOT_OURS = (
    *(_WIDTH, "architectures", "model_type", "torch_dtype", "dtype"),
    *("transformers_version", "task_specific_params"),
)


@torch.no_grad()
def with_full_projection(student: SecondcastStudent) -> SecondcastStudent:
    """A student whose low-rank projection, which the published class lacks, is multiplied out; up to rounding."""
    if getattr(student.config, "projection_rank", None) is None:
        return student
    config, tensors = copy.deepcopy(student.config), student.state_dict()
    del config.projection_rank
    full = SecondcastStudent(config).eval()
    down, up = (tensors.pop(f"final_projection.{number}.weight").double() for number in (3, 4))
    full.load_state_dict(tensors | {"final_projection.3.weight": (up @ down).float()})
    return full


def published_config(student: SecondcastStudent) -> dict[str, Any]:
    """The config.json with which the published class loads a student."""
    config: dict[str, Any] = json.loads(student.config.to_json_string(use_diff=False))
    config = {key: value for key, value in config.items() if key not in _NOT_PUBLISHED}
    return config | {"architectures": [PUBLISHED_CLASS], "model_type": "t5", _WIDTH: student.config.project_out_dim}


def published_tensors(student: SecondcastStudent) -> dict[str, torch.Tensor]:
    """The tensors under their published names, on the host: the token embedding once, as `encoder.shared.weight`."""
    return {name: value.contiguous().cpu() for name, value in student.state_dict().items() if name != _TIED}


def student_config(config: dict[str, Any]) -> StudentConfig:
    """The StudentConfig of a student in the published format."""
    kept = {key: value for key, value in config.items() if key not in _NOT_OURS}
    width = {"project_out_dim": config[_WIDTH]} if _WIDTH in config else {}
    return StudentConfig(**kept | width | {"is_encoder_decoder": False})


def load_published(folder: Path, config: dict[str, Any], source: CheckpointSource) -> SecondcastStudent:
    """A student from a folder in the published format, fp32, in eval mode.

    config: its config.json. Raises source.error.
    """
    student: SecondcastStudent = load_checked(
        SecondcastStudent, folder, source, config=student_config(config), dtype=torch.float32
    )
    return student


def comfyui_differences(student: SecondcastStudent) -> list[str]:
    """Values of a student that differ from the ComfyUI node's, such as "d_ff = 3072 (2048)"."""
    config = student.config
    return [
        f"{name} = {getattr(config, name)} ({expected})"
        for name, expected in COMFYUI_EXPECTS.items()
        if getattr(config, name) != expected
    ]

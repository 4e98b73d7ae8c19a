"""The supported teachers: checks of the configuration files of a folder, before anything is loaded."""

import json
from pathlib import Path
from typing import Any

from secondcast.storage_schemas.errors import TeacherError

# By part: the key of its configuration that names its class, the supported class, required keys.
_PARTS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "transformer": (
        "_class_name",
        "FluxTransformer2DModel",
        (
            "in_channels",
            "guidance_embeds",
            "joint_attention_dim",
            "pooled_projection_dim",
            "attention_head_dim",
            "axes_dims_rope",
        ),
    ),
    "scheduler": ("_class_name", "FlowMatchEulerDiscreteScheduler", ()),
    "text_encoder_2": ("model_type", "t5", ("d_model", "vocab_size")),
    "text_encoder": ("model_type", "clip_text_model", ("hidden_size",)),
    "vae": ("_class_name", "AutoencoderKL", ("block_out_channels",)),
}
_PIPELINE = "FluxPipeline"
_RECORDED = "this version supports FLUX.1-dev, FLUX.1-schnell, and models with their layout"


def config_name(part: str) -> str:
    """The file name of a part's configuration."""
    return "scheduler_config.json" if part == "scheduler" else "config.json"


def read_config(file: Path, part: str) -> dict[str, Any]:
    """A JSON object; TeacherError if there is none."""
    try:
        config = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise TeacherError(f"{file} cannot be read ({error}): the teacher's {part} is incomplete") from error
    if not isinstance(config, dict):
        raise TeacherError(f"{file} is a {type(config).__name__}, expected an object: the teacher's {part} is damaged")
    return config


def check_family(path: Path, parts: tuple[str, ...]) -> None:
    """Raise TeacherError unless the pipeline and these parts are of the supported classes.

    A configuration that names no class passes.
    """
    index = path / "model_index.json"
    if index.is_file():
        _check_class(index, read_config(index, "model index"), "_class_name", _PIPELINE)
    for part in parts:
        if part in _PARTS:
            key, expected, needed = _PARTS[part]
            file = path / part / config_name(part)
            config = read_config(file, part)
            _check_class(file, config, key, expected)
            if missing := [name for name in needed if name not in config]:
                raise TeacherError(f"{file} has no {missing[0]}: not the {part} of a FLUX teacher; {_RECORDED}")
    if "transformer" in parts:
        _check_channels(path / "transformer" / "config.json")


def _check_class(file: Path, config: dict[str, Any], key: str, expected: str) -> None:
    if (found := config.get(key)) not in (None, expected):
        raise TeacherError(f"{file} has {key} = {found!r}, expected {expected!r}: {_RECORDED}")


def _check_channels(file: Path) -> None:
    config = read_config(file, "transformer")
    taken, given = config["in_channels"], config.get("out_channels")
    if given not in (None, taken):
        raise TeacherError(
            f"{file} has in_channels = {taken} and out_channels = {given}, expected equal numbers: it reads an image "
            f"in addition to the latent (Fill, Canny, Depth); {_RECORDED}"
        )

"""Costs of a text encoder (the teacher's or a student): parameters, FLOPs and bytes, from its configuration alone."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import T5Config, T5EncoderModel

from secondcast.models.memory.meta_run import count_flops, parameter_count, peak_bytes, saved_bytes
from secondcast.models.schedule import DTYPES
from secondcast.models.student.distillt5 import is_published_form
from secondcast.models.student.student import _OWN_KEYS, _source_config, _t5_config, new_student
from secondcast.models.student.student_network import SecondcastStudent, StudentConfig
from secondcast.storage_schemas.errors import StudentError
from secondcast.storage_schemas.schema.manifest import Manifest


@dataclass(frozen=True, kw_only=True)
class TextEncoderCost:
    """Costs of a text encoder or student: parameters; FLOPs and bytes of one text."""

    parameters: int
    forward_flops: float
    forward_peak_bytes: int
    saved_bytes: int


def text_encoder_cost(manifest: Manifest) -> TextEncoderCost:
    """The teacher's T5 encoder at the cache's text length and dtype."""
    with torch.device("meta"):
        model = T5EncoderModel(T5Config.from_dict(manifest.teacher.text_encoder_config))
    model = model.to(DTYPES[manifest.sampling.dtype]).eval().requires_grad_(False)
    return _text_cost(model, manifest.teacher.text_length, saved=False)


def student_cost(source: str, manifest: Manifest) -> TextEncoderCost:
    """A student with its projection, fp32.

    source: see `student_config`; or another encoder with its tokenizer.

    Raises StudentError if the student does not fit the teacher.
    """
    if _is_of_another_kind(source):
        with torch.device("meta"):
            student = new_student(source, manifest.teacher, init="random", dropout=0.0, seed=0)
        return _text_cost(student.train(), student.config.text_length, saved=True)
    config = student_config(source)
    needed = int(manifest.teacher.text_encoder_config["vocab_size"])
    if config.vocab_size < needed:
        raise StudentError(
            f"{source} has a vocabulary of {config.vocab_size}, but the teacher's token ids go up to {needed - 1}: use "
            "a student with the teacher's tokenizer"
        )
    kept = {key: value for key, value in config.to_dict().items() if key not in _OWN_KEYS}
    with torch.device("meta"):
        model = SecondcastStudent(
            StudentConfig(
                project_in_dim=config.d_model,
                project_out_dim=manifest.teacher.text_width,
                text_length=manifest.teacher.text_length,
                **kept,
            )
        )
    return _text_cost(model.float().train(), manifest.teacher.text_length, saved=True)


_V1_1: dict[str, Any] = {"d_kv": 64, "vocab_size": 32128, "feed_forward_proj": "gated-gelu"}
_FIRST: dict[str, Any] = {"d_kv": 64, "vocab_size": 32128, "feed_forward_proj": "relu"}
_SMALL = {"d_model": 512, "d_ff": 1024, "num_layers": 8, "num_heads": 6}
_BASE = {"d_model": 768, "d_ff": 2048, "num_layers": 12, "num_heads": 12}
_LARGE = {"d_model": 1024, "d_ff": 2816, "num_layers": 24, "num_heads": 16}
_XL = {"d_model": 2048, "d_ff": 5120, "num_layers": 24, "num_heads": 32}
# The sizes of T5's own repositories, so that planning needs no network.
STUDENT_SIZES: dict[str, dict[str, Any]] = {
    **{
        name: _V1_1 | size
        for name, size in zip(("small", "base", "large", "xl"), (_SMALL, _BASE, _LARGE, _XL), strict=True)
    },
    "google/t5-v1_1-small": _V1_1 | _SMALL,
    "google/t5-v1_1-base": _V1_1 | _BASE,
    "google/t5-v1_1-large": _V1_1 | _LARGE,
    "google/t5-v1_1-xl": _V1_1 | _XL,
    "google-t5/t5-small": _FIRST | {"d_model": 512, "d_ff": 2048, "num_layers": 6, "num_heads": 8},
    "google-t5/t5-base": _FIRST | {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12},
    "google-t5/t5-large": _FIRST | {"d_model": 1024, "d_ff": 4096, "num_layers": 24, "num_heads": 16},
}


def student_config(source: str) -> T5Config:
    """A T5 configuration: small, base, large, xl (T5 1.1), a hub name, a folder, or a config.json."""
    if source in STUDENT_SIZES:
        return T5Config(is_encoder_decoder=False, use_cache=False, **STUDENT_SIZES[source])
    path = Path(source)
    return _t5_config(str(path.parent) if path.is_file() and path.name == "config.json" else source)


def _is_of_another_kind(source: str) -> bool:
    if source in STUDENT_SIZES or Path(source).name == "config.json":
        return False
    found = _source_config(source)
    return found.get("model_type") not in ("t5", StudentConfig.model_type) and not is_published_form(found)


def _text_cost(model: torch.nn.Module, length: int, *, saved: bool) -> TextEncoderCost:
    def run() -> Any:
        return model(torch.empty(1, length, dtype=torch.int64, device="meta"))[0]

    parameters = list(model.parameters())
    with torch.no_grad():
        flops = count_flops(run)
    return TextEncoderCost(
        parameters=parameter_count(model),
        forward_flops=flops.total,
        forward_peak_bytes=peak_bytes(run, parameters),
        saved_bytes=saved_bytes(run, parameters) if saved else 0,
    )

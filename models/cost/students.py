"""Costs of students that are no size of T5 by name: a folder, a hub repository, or a config.json."""

from pathlib import Path

import torch
from transformers import T5Config

from secondcast.models.cost.counting import count, text_cost
from secondcast.models.cost.network_costs import TextEncoderCost
from secondcast.models.cost.shapes import STUDENT_SIZES, StudentShapes
from secondcast.models.student.distillt5 import is_published_form
from secondcast.models.student.projection_rank import check_kept_rank
from secondcast.models.student.student import _OWN_KEYS, _source_config, _t5_config, new_student
from secondcast.models.student.student_network import StudentConfig
from secondcast.storage_schemas.schema.manifest import Teacher


def counted_student(source: str, teacher: Teacher, projection_rank: int | None = None) -> TextEncoderCost:
    """A student with its projection, fp32. StudentError if it does not fit the teacher.

    source: see student_config; or another encoder with its tokenizer.
    projection_rank: of a new projection; None: full, or that of an earlier student.
    """
    source = _folder_of(source)
    if _is_of_another_kind(source):
        with torch.device("meta"):
            student = new_student(source, teacher, init="random", dropout=0.0, seed=0, projection_rank=projection_rank)
        return text_cost(student.train(), student.config.text_length, saved=True)
    config = student_config(source).to_dict()
    check_kept_rank(projection_rank, source, config)
    kept = {key: value for key, value in config.items() if key not in _OWN_KEYS}
    if projection_rank is not None:
        kept["projection_rank"] = projection_rank
    return TextEncoderCost(**count(StudentShapes.of(source, kept, teacher)))


def student_config(source: str) -> T5Config:
    """A T5 configuration: a name of STUDENT_SIZES, a hub name, a folder, or a config.json."""
    if source in STUDENT_SIZES:
        return T5Config(**STUDENT_SIZES[source])
    return _t5_config(_folder_of(source))


def _folder_of(source: str) -> str:
    """The folder of a config.json; any other source as it is."""
    path = Path(source)
    return str(path.parent) if path.is_file() and path.name == "config.json" else source


def _is_of_another_kind(source: str) -> bool:
    found = _source_config(source)
    return found.get("model_type") not in ("t5", StudentConfig.model_type) and not is_published_form(found)

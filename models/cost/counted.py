"""Costs of networks: those of the bundled configurations from a table, others counted when they are asked for.

The table, counted.json, lets a plan start without torch, diffusers and transformers. See models/cost/bundled.py.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

from secondcast.models.cost.network_costs import BackboneCost, BlockCost, TextEncoderCost
from secondcast.models.cost.shapes import (
    STUDENT_SIZES,
    CallShapes,
    ClipConfig,
    DecodingShapes,
    Shapes,
    StudentShapes,
    TextEncoderShapes,
    VaeConfig,
    fits_tokens,
)
from secondcast.models.families.family import Family
from secondcast.models.geometry import Geometry
from secondcast.models.student.projection_rank import check_rank, layer_width
from secondcast.models.teacher.folder import TeacherFolder
from secondcast.storage_schemas.schema.manifest import Manifest, Teacher

TABLE = Path(__file__).with_name("counted.json")


def backbone_cost(shapes: CallShapes) -> BackboneCost:
    """The costs of a transformer in calls of these shapes."""
    figures = _figures(shapes)
    return BackboneCost(**figures | {"kinds": tuple(BlockCost(**kind) for kind in figures["kinds"])})


def text_encoder_cost(manifest: Manifest) -> TextEncoderCost:
    """The teacher's large text encoder at the cache's text length and dtype."""
    return TextEncoderCost(**_figures(TextEncoderShapes.of(manifest.teacher, manifest.dtype)))


def student_cost(
    source: str | dict[str, Any], manifest: Manifest, projection_rank: int | None = None
) -> TextEncoderCost:
    """A student with its projection, fp32.

    source: a name of STUDENT_SIZES, a hub name, a folder, or the config.json of a T5; or another encoder with its
        tokenizer; or the configuration of a T5 that does not exist yet.
    projection_rank: of a new projection; None: full, or that of an earlier student.

    Raises StudentError if the student does not fit the teacher, SettingsError for a rank that is too large.
    """
    check_rank(projection_rank, layer_width(manifest.teacher))
    if isinstance(source, dict):
        return _of_tokens("the student", source, manifest.teacher, projection_rank)
    layers, known = manifest.teacher.text_layers, STUDENT_SIZES.get(source)
    # In place of T5, other encoders have their own tokenizer.
    if known is not None and (layers is not None or fits_tokens(known, layers)):
        return _of_tokens(source, known, manifest.teacher, projection_rank)
    from secondcast.models.cost.students import counted_student

    return counted_student(source, manifest.teacher, projection_rank)


def _of_tokens(name: str, config: dict[str, Any], teacher: Teacher, projection_rank: int | None) -> TextEncoderCost:
    ranked = config if projection_rank is None else config | {"projection_rank": projection_rank}
    return TextEncoderCost(**_figures(StudentShapes.of(name, ranked, teacher)))


def decoding_bytes(config: dict[str, Any], family: Family, geometry: Geometry) -> int:
    """Bytes of activations while the VAE decodes one image in fp32, its weights left out."""
    size = {"height": geometry.height, "width": geometry.width}
    return int(_figures(DecodingShapes(family=family.name, config=config, **size)))


def vae_parameters(config: dict[str, Any], family: Family) -> int:
    """Parameters of the VAE, of which a build only reads the configuration."""
    return int(_figures(VaeConfig(config=config, kind=family.vae)))


def clip_parameters(config: dict[str, Any]) -> int:
    """Parameters of the CLIP text encoder."""
    return int(_figures(ClipConfig(config=config)))


def recorded_clip_parameters(manifest: Manifest) -> int:
    """Parameters of the text encoders beside the large one that a build of this cache loads."""
    found = manifest.teacher.pooled_encoder_config
    if found is None:
        return 0
    # Of two, by the folders of the parts.
    return sum(map(clip_parameters, [found] if "hidden_size" in found else found.values()))


def teacher_clip_parameters(teacher: TeacherFolder) -> int:
    """Parameters of all text encoders of a teacher beside the large one."""
    return sum(clip_parameters(teacher.config(encoder)) for encoder, _ in teacher.family.conditioning_roles)


@cache
def _known() -> dict[str, Any]:
    """The figures of the table, and those that this process has counted."""
    return dict(json.loads(TABLE.read_bytes()))


def _figures(shapes: Shapes) -> Any:
    known, key = _known(), shapes.key
    if key not in known:
        # It imports torch, diffusers and transformers.
        from secondcast.models.cost.counting import count

        known[key] = count(shapes)
    return known[key]

"""Counts the networks of the bundled configurations at the usual sizes, into counted.json.

python -m secondcast.models.cost.bundled            # minutes

For a change of what is counted, of a bundled configuration, or of the versions in constraints.txt.
"""

import json
from collections.abc import Iterator

from secondcast.models.cost.counted import TABLE
from secondcast.models.cost.counting import count
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
from secondcast.models.teacher.folder import TeacherFolder
from secondcast.models.teacher.pipeline_inputs import ImageSize
from secondcast.models.teacher.planned import bundled_teachers, planned_teacher
from secondcast.storage_schemas.schema.recording import Dtype

RESOLUTIONS_PX = (256, 512, 768, 1024)
TEXT_LENGTHS = (77, 128, 256, 512)
DTYPE: Dtype = "bfloat16"


def bundled_shapes() -> dict[str, Shapes]:
    """All that is in the table, by its keys."""
    teachers = [planned_teacher(name)[0] for name in bundled_teachers()]
    return {shapes.key: shapes for teacher in teachers for shapes in _shapes_of(teacher)}


def _shapes_of(teacher: TeacherFolder) -> Iterator[Shapes]:
    transformer, vae, family = teacher.config("transformer"), teacher.config("vae"), teacher.family
    lengths = sorted({family.text_length, *(one for one in TEXT_LENGTHS if one <= family.largest_text_length)})
    for side in RESOLUTIONS_PX:
        geometry = teacher.geometry(ImageSize(resolution=side))
        yield DecodingShapes(config=vae, family=teacher.family.name, height=side, width=side)
        for length in lengths:
            yield CallShapes.of_teacher(
                teacher.family,
                transformer,
                geometry,
                text_length=length,
                dtype=DTYPE,
                conditioning=teacher.conditioning,
            )
    for length in lengths:
        identity = teacher.identity(text_length=length, hashed=False)
        yield TextEncoderShapes.of(identity, DTYPE)
        for name, config in STUDENT_SIZES.items():
            if fits_tokens(config, family.text_layers):
                yield StudentShapes.of(name, config, identity)
    yield VaeConfig(config=vae, kind=family.vae)
    for encoder, _ in teacher.family.conditioning_roles:
        yield ClipConfig(config=teacher.config(encoder))


def main() -> None:
    """Count everything and write the table, a line for each key."""
    lines = [f"{json.dumps(key)}: {json.dumps(count(shapes))}" for key, shapes in sorted(bundled_shapes().items())]
    TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()

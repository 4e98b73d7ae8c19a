"""The [init-student] of a recipe in its plan: the size of the student that training starts from."""

from collections.abc import Mapping
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secondcast.commands.init_student import init_student, size_of
from secondcast.commands.plan.cards import count_text
from secondcast.commands.shell.console import print_facts
from secondcast.commands.shell.flags import with_flags
from secondcast.models.families.registry import family_named
from secondcast.models.student.initial.settings import InitialOptions, check_makes_students
from secondcast.storage_schemas.errors import SettingsError
from secondcast.storage_schemas.progress import size_text

if TYPE_CHECKING:
    from secondcast.storage_schemas.schema.manifest import Teacher

_TABLE = "[init-student]"


def initial_options(recipe: Path, table: Mapping[str, Any]) -> tuple[str, InitialOptions]:
    """Teacher and options of an initial student. SettingsError names the key that is missing, unknown or wrong."""
    keys = {name: name.replace("_", "-") for name in InitialOptions.model_fields} | {"source": "from"}
    others = {*signature(with_flags(init_student)).parameters} - {"out", "config", "context", *keys}
    known = {*keys.values(), *(name.replace("_", "-") for name in others)}
    values = {key.replace("_", "-"): value for key, value in table.items()}
    if unknown := sorted(values.keys() - known):
        raise SettingsError(
            f"{_TABLE} of {recipe} has the unknown key {unknown[0]!r}, expected one of {', '.join(sorted(known))}"
        )
    if missing := [key for key in ("teacher", "size") if key not in values]:
        raise SettingsError(
            f"{_TABLE} of {recipe} has no {missing[0]}, expected lines such as teacher = 'pocket' and size = 'base'"
        )
    options = {name: values[key] for name, key in keys.items() if key in values}
    return str(values["teacher"]), InitialOptions.from_flags(**options)


def planned_student(asked: InitialOptions, teacher: "Teacher") -> str | dict[str, Any]:
    """The student to be made, as for student_cost: a cut for `auto`, whose other kinds are seldom larger."""
    check_makes_students(family_named(teacher.family), teacher.family)
    if asked.kind == "pretrained" and asked.source is not None:
        return asked.source
    from secondcast.models.cost.shapes import STUDENT_SIZES
    from secondcast.models.student.initial.size import Size

    config = teacher.text_encoder_config
    size, whole = size_of(asked.size, config), Size.of_teacher(config)
    size.check_within(whole)
    if asked.kind == "shallow":
        size = replace(whole, layers=size.layers)
    found, known = size.t5_config(config), STUDENT_SIZES.get(asked.size)
    # A size in the table of counted costs is planned without torch.
    return asked.size if known is not None and known.items() <= found.items() else found


def initial_facts(asked: InitialOptions, parameters: int) -> dict[str, Any]:
    """What is planned about an initial student, as JSON types."""
    return {"kind": asked.kind, "size": asked.size, "parameters": parameters, "bytes": 4 * parameters}


def print_initial(facts: Mapping[str, Any]) -> None:
    """Print the plan of an initial student."""
    kind = "cut, the kind planned for auto" if facts["kind"] == "auto" else facts["kind"]
    print_facts({
        "student": f"{facts['size']} ({kind}), {count_text(facts['parameters'])} parameters with its projection, "
        f"{size_text(facts['bytes'])} in fp32 (calculated)",
    })  # fmt: skip

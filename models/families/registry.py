"""The supported families, and how to find one: by its name in a manifest, by a pipeline, by a transformer."""

from collections.abc import Sequence

from secondcast.models.families.anatomy import Anatomy
from secondcast.models.families.family import Family
from secondcast.models.families.flux import FLUX, FLUX_KONTEXT
from secondcast.models.families.klein import KLEIN
from secondcast.models.families.licences import Licence
from secondcast.models.families.pixart import PIXART_SIGMA
from secondcast.models.families.sd3 import SD3
from secondcast.storage_schemas.errors import TeacherError

# Of several families with one transformer, the first one is that of a transformer alone.
FAMILIES: tuple[Family, ...] = (FLUX, FLUX_KONTEXT, SD3, PIXART_SIGMA, KLEIN)


def supported_models() -> str:
    """What this version supports, for messages."""
    models = ", ".join(model for family in FAMILIES for model in family.models)
    return f"this version supports {models}, and models with their layout"


def usual_students() -> str:
    """The usual student of each family, for messages and help."""
    first = FAMILIES[0].student
    others = [f"{family.student} for {family.title}" for family in FAMILIES if family.student != first]
    return ", or ".join([first, *others])


def family_named(name: str) -> Family:
    """A family by its name in a manifest; TeacherError for one that this version does not know."""
    for family in FAMILIES:
        if family.name == name:
            return family
    raise TeacherError(
        f"the cache was recorded with a teacher of the family {name!r}, this version knows "
        f"{', '.join(family.name for family in FAMILIES)}: a newer version recorded it; upgrade secondcast"
    )


def licence_of(teacher: str) -> tuple[str, Licence] | None:
    """The model, with its owner, that a hub name or folder is named after, and its licence; None for another name.

    Of several (a merge), one with a non-commercial licence.
    """
    found = [
        (f"{family.owner}/{model}", licence)
        for family in FAMILIES
        for model, licence in family.licences.items()
        if model.casefold() in teacher.casefold()
    ]
    return max(found, key=lambda entry: entry[1].non_commercial, default=None)


def family_of_pipeline(pipeline: str) -> Family | None:
    """A family by the class name of its pipeline; None if none has it."""
    return next((family for family in FAMILIES if family.pipeline == pipeline), None)


def family_of_layers(layers: Sequence[int] | None) -> Family:
    """The first family that reads these layers of its text encoder; None: the last one."""
    wanted = None if layers is None else tuple(layers)
    return next((family for family in FAMILIES if family.text_layers == wanted), FAMILIES[0])


def family_of_transformer(transformer: object) -> Family:
    """A family by a transformer of diffusers; TypeError for any other object."""
    name = type(transformer).__name__
    for family in FAMILIES:
        if family.transformer == name:
            return family
    raise TypeError(f"no family has the transformer {name}, expected one of {[f.transformer for f in FAMILIES]}")


def anatomy_of(transformer: object) -> Anatomy:
    """Where the networks of a transformer are."""
    return family_of_transformer(transformer).anatomy

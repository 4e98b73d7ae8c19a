"""Compares manifests: what differs between two caches, what depends on it, and whether one continues the other."""

from collections.abc import Iterator
from typing import Any

from secondcast.storage_schemas.errors import SettingsMismatchError
from secondcast.storage_schemas.io.digests import canonical_json
from secondcast.storage_schemas.schema.first_difference import first_difference
from secondcast.storage_schemas.schema.manifest import Manifest, Teacher

_DEPENDS = {
    "teacher": "every recorded number",
    "sampling": "every recorded trajectory",
    "text": "every recorded embedding",
    "prompts": "the order of all trajectories",
}
# The consequence of a difference between two caches, by field name; the first that matches.
_FOLLOWS = (
    ("teacher", "different teachers: the two caches can neither train one student together nor be merged"),
    (
        "sampling.storage.compression",
        "different compression: `secondcast convert` makes them equal (only towards int8, which rounds)",
    ),
    (
        "sampling.storage.embeddings",
        "one has no embeddings: `secondcast convert --no-store-embeddings` makes them equal",
    ),
    ("sampling.storage", "the same trajectories in another storage format: `secondcast convert` makes them equal"),
    ("sampling.quantize", "different teacher weights: the two can neither train one student together nor be merged"),
    ("sampling.seed", "different noise: the two can train one student together, but not be merged"),
    ("sampling", "different trajectories: the two can train one student together, but not be merged"),
    ("text.storage", "the same embeddings in another storage format: `secondcast convert` makes them equal"),
    ("text", "different embeddings: the two can train one student together, but not be merged"),
    ("prompts", "different prompts, or another order or sharding of them: they can still be merged"),
    ("metadata", "written by another version of zarr-python: the values are not affected"),
    ("provenance", "made by other versions or on another machine: bit equality is not guaranteed"),
)
# Fields are compared by section: if the first difference is in `prompts`, the other sections agree.
_EXTEND_HINT = (
    "; `secondcast build --extend` adds prompts or samples to a cache, and is required for a cache that was extended"
)
RECORDING = ("teacher", "sampling", "text")
SECTIONS = (*RECORDING, "prompts")


def check_same_settings(found: Manifest, wanted: Manifest, where: str, *, sections: tuple[str, ...] = SECTIONS) -> None:
    """Raise SettingsMismatchError, naming the first field, both values, what depends on it, and the fix."""
    if found.is_text != wanted.is_text:
        was, now = (_kind(manifest) for manifest in (found, wanted))
        raise SettingsMismatchError(
            f"{where} is {was}, requested was {now}: the two cannot be one cache; "
            f"{'give' if found.is_text else 'remove'} --text-only, or give another folder"
        )
    for field, was, now in differing_fields(found, wanted, sections=sections):
        hint = _EXTEND_HINT if field.startswith("prompts.") else ""
        first = first_difference(was, now, field)
        raise SettingsMismatchError(
            f"{where} was built with {first.path} = {first.one}, requested {first.other}: "
            f"{depends_on(field)} depends on it; give the original options, or another folder{hint}"
        )


def _kind(manifest: Manifest) -> str:
    return "a text cache, without trajectories" if manifest.is_text else "a cache with trajectories"


def depends_on(field: str) -> str:
    """What depends on a field of the manifest."""
    if field.startswith(("sampling.storage.", "text.storage.")):
        return "every byte of the shards (`secondcast convert` changes the storage)"
    return _DEPENDS[field.split(".")[0]]


def consequence(field: str) -> str:
    """The consequence if two caches differ in a field of the manifest (`sampling.seed`) or in `provenance.x`."""
    for beginning, follows in _FOLLOWS:
        if field == beginning or field.startswith(f"{beginning}."):
            return follows
    return "informational only: no consequence"


def check_same_teacher(found: Manifest, teacher: Teacher, where: str) -> None:
    """Raise SettingsMismatchError, naming the first field, unless a cache was recorded with this teacher."""
    for field, was, now in _causes_first(differences(found.teacher.json_value(), teacher.json_value(), "teacher")):
        first = first_difference(was, now, field)
        raise SettingsMismatchError(
            f"{where} was recorded with {first.path} = {first.one}, this teacher has {first.other}: "
            f"{_DEPENDS['teacher']} depends on it; give the recorded teacher, {found.source!r}"
        )


def differing_fields(
    a: Manifest, b: Manifest, *, sections: tuple[str, ...] = SECTIONS
) -> Iterator[tuple[str, Any, Any]]:
    """Path and both values of each field of teacher, sampling or text, and prompts in which two manifests differ."""
    ours, theirs = (_sections(manifest) for manifest in (a, b))
    for section in sections:
        yield from _causes_first(differences(ours[section], theirs[section], section))


def _sections(manifest: Manifest) -> dict[str, Any]:
    """The sections as JSON with all keys; None for the one that a manifest of this kind lacks."""
    found = {
        "teacher": manifest.teacher,
        "sampling": manifest.sampling_or_none,
        "text": manifest.text,
        "prompts": manifest.prompts,
    }
    return {
        name: None if record is None else record.model_dump(mode="json", context="all keys")
        for name, record in found.items()
    }


def _causes_first(found: Iterator[tuple[str, Any, Any]]) -> list[tuple[str, Any, Any]]:
    # With CLIP its weights are part of the teacher: name the option before them.
    return sorted(found, key=lambda difference: difference[0] != "teacher.pooled")


def differences(a: Any, b: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    """Path and both values of each field in which two JSON values differ; an absent field counts as None."""
    if isinstance(a, dict) and isinstance(b, dict):
        # In field order, so that `steps` is named before the sigmas that depend on it.
        for key in [*a, *(key for key in b if key not in a)]:
            yield from differences(a.get(key), b.get(key), f"{path}.{key}")
    elif canonical_json(a) != canonical_json(b):
        yield path, a, b


def shortened(value: Any) -> str:
    """A JSON value in at most 60 characters."""
    text = canonical_json(value).decode()
    return text if len(text) <= 60 else f"{text[:57]}..."

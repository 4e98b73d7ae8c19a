"""Converts the storage of a cache: format, compression, latents stored or derived. Lossless both ways, except int8."""

from pydantic import ValidationError

from secondcast.storage_schemas.errors import SettingsError
from secondcast.storage_schemas.io.folders import Location
from secondcast.storage_schemas.maintenance.rewrite import Rewritten, Source, rewrite
from secondcast.storage_schemas.progress import Progress
from secondcast.storage_schemas.reader import Cache
from secondcast.storage_schemas.schema.manifest import Manifest
from secondcast.storage_schemas.schema.problems import first_problem
from secondcast.storage_schemas.schema.recording import (
    ArrayStorage,
    Storage,
    TextRecording,
    guided_problem,
    int8_problem,
    pooled_problem,
    text_compression_problem,
)


def convert(cache: Cache, location: Location, progress: Progress, **storage: str | None) -> Rewritten:
    """Rewrite `cache` at `location` with some fields of its Storage changed; None keeps a field.

    Raises the errors of `rewrite`, and SettingsError for incompatible fields.
    """
    source = Source(cache)
    return rewrite(location, _converted(cache.manifest, storage), source.prompts, [source], progress, title="convert")


def _converted(manifest: Manifest, changes: dict[str, str | None]) -> Manifest:
    if manifest.text is not None:
        return _converted_text(manifest, manifest.text, changes)
    now = manifest.sampling.storage
    wanted = now.json_value() | {name: value for name, value in changes.items() if value is not None}
    if problem := int8_problem(wanted["compression"], wanted["latents"]):
        raise SettingsError(f"--compression: {problem}")
    try:
        storage = Storage.model_validate(wanted)
    except ValidationError as error:
        raise SettingsError(f"--{first_problem(error)}") from error
    if problem := guided_problem(manifest.sampling.negative_prompt, storage.latents):
        raise SettingsError(f"--latents derived: {problem}")
    if problem := pooled_problem(manifest.teacher.pooled, storage.embeddings):
        raise SettingsError(f"--no-store-embeddings: the source was built with --pooled clip, and {problem}")
    if now.compression == "int8" != storage.compression:
        raise SettingsError(
            f"--compression {storage.compression}: the source has compression int8, which rounded the velocity, and "
            f"the recorded values are lost; convert the cache that it was made from, or build again"
        )
    if now.embeddings == "none" != storage.embeddings:
        raise SettingsError("--store-embeddings: the source has none (--no-store-embeddings); build another cache")
    return manifest.model_copy(update={"sampling_or_none": manifest.sampling.model_copy(update={"storage": storage})})


def _converted_text(manifest: Manifest, text: TextRecording, changes: dict[str, str | None]) -> Manifest:
    for name, value in changes.items():
        if value is not None and name not in ArrayStorage.model_fields:
            flag = "--no-store-embeddings" if name == "embeddings" else f"--{name} {value}"
            raise SettingsError(f"{flag}: the source is a text cache, which has only embeddings; remove it")
    storage = text.storage.model_copy(update={name: value for name, value in changes.items() if value is not None})
    if problem := text_compression_problem(storage.compression):
        raise SettingsError(f"--compression: {problem}")
    return manifest.model_copy(update={"text": text.model_copy(update={"storage": storage})})

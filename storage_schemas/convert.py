"""A cache in another format, codec, or with latents stored instead of derived: there and back, the same bytes."""

from pydantic import ValidationError

from storage_schemas.errors import BadSettings
from storage_schemas.folders import Location
from storage_schemas.manifest import Manifest, Storage, first_problem
from storage_schemas.progress import Progress
from storage_schemas.reader import Cache
from storage_schemas.rewrite import Rewritten, Source, rewrite


def convert(cache: Cache, location: Location, progress: Progress, **storage: str | None) -> Rewritten:
    """Write `cache` anew at `location` with some fields of its Storage changed; None keeps a field.

    Raises what `rewrite` does, and BadSettings for fields that do not go together.
    """
    source = Source(cache)
    return rewrite(location, _converted(cache.manifest, storage), source.prompts, [source], progress, title="convert")


def _converted(manifest: Manifest, changes: dict[str, str | None]) -> Manifest:
    wanted = manifest.sampling.storage.json_value() | {k: v for k, v in changes.items() if v is not None}
    try:
        storage = Storage.model_validate(wanted)
    except ValidationError as error:
        raise BadSettings(f"--{first_problem(error)}") from error
    return manifest.model_copy(update={"sampling": manifest.sampling.model_copy(update={"storage": storage})})

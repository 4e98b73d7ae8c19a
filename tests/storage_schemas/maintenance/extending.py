"""Extensions for tests, of caches whose numbers follow from prompt and sample."""

from pathlib import Path
from typing import Any

from secondcast.storage_schemas.io.folders import Folder, open_folder
from secondcast.storage_schemas.maintenance.extend import extend
from secondcast.storage_schemas.progress import Progress, Silent
from secondcast.storage_schemas.reader import Cache, read_manifest
from secondcast.storage_schemas.schema.manifest import Manifest
from secondcast.storage_schemas.schema.prompts import Prompt
from secondcast.storage_schemas.writer import CacheWriter
from tests.storage_schemas.caches import keyed_arrays, some_manifest

TOKENIZER = {"spiece.model": b"pieces"}


def wanted(manifest: Manifest, prompts: list[Prompt], **changes: Any) -> Manifest:
    """What a build with the flags of a cache's first one asks for, but for these prompts and changes."""
    asked = some_manifest(prompts, **{"seed": manifest.sampling.seed, **changes})
    sampling = asked.sampling.model_copy(update={"storage": manifest.sampling.storage})
    return asked.model_copy(update={"teacher": manifest.teacher, "sampling_or_none": sampling})


def extended(
    location: Folder | Path | str, prompts: list[Prompt], *, progress: Progress | None = None, **changes: Any
) -> CacheWriter:
    folder = open_folder(location) if isinstance(location, str | Path) else location
    return extend(folder, wanted(read_manifest(folder), prompts, **changes), prompts, TOKENIZER, progress or Silent())


def commit_all(writer: CacheWriter) -> bool:
    for kind in ("embeddings", "trajectories"):
        for shard in writer.missing(kind):
            writer.commit(kind, shard, keyed_arrays(writer, shard, kind), seconds=1.0, provenance={"device": "made-up"})
    return writer.finish()


def tree(path: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(path)): p.read_bytes() if p.is_file() else None for p in path.rglob("*")}


def rows(cache: Cache) -> dict[str, tuple]:
    found = {}
    for index in cache.indices():
        t = cache.trajectory(int(index))
        arrays = (t.noise_SC, t.velocity_KSC, t.final_latent_SC, cache.embedding(t.prompt))
        found[t.key] = (t.guidance, *(array.tobytes() for array in arrays))
    return found

"""`inspect summary`: what a cache is, on one screen. Reads manifest and commit records; no torch."""

from typing import Any

from storage_schemas.commits import KINDS
from storage_schemas.fields import fields_of
from storage_schemas.progress import size_text
from storage_schemas.reader import Cache


def summarise(cache: Cache) -> dict[str, Any]:
    """The facts of a cache, as plain JSON types."""
    manifest, sampling = cache.manifest, cache.manifest.sampling
    records = list(cache.records.values())
    seconds = sum(record.seconds for record in records)
    return {
        "path": str(cache.folder),
        "state": "finished" if cache.finished else "being built",
        "trajectories": {"committed": len(cache), "planned": cache.planned},
        "prompts": {
            "count": manifest.prompts.count,
            "held_out": manifest.prompts.held_out,
            "sources": manifest.prompts.sources,
        },
        "teacher": {
            "source": manifest.source,
            "text_length": manifest.teacher.text_length,
            "text_width": manifest.teacher.text_width,
            "pooled": manifest.teacher.pooled,
        },
        "sampling": {
            "size": f"{sampling.width} x {sampling.height}",
            "image_tokens": sampling.image_tokens,
            "channels": sampling.channels,
            "steps": sampling.steps,
            "schedule": sampling.schedule,
            "sigmas": [sampling.sigmas[0], sampling.sigmas[-2]],
            "guidance": list(sampling.guidance) if sampling.guidance else None,
            "seed": sampling.seed,
            "dtype": sampling.dtype,
            "quantize": sampling.quantize,
        },
        "storage": {
            **sampling.storage.json_value(),
            "embeddings": sampling.storage.embeddings,
            "bytes": cache.records.bytes,
            "raw_bytes": sum(record.raw_bytes for record in records),
            "row_bytes": {field.name: field.row_bytes for kind in KINDS for field in fields_of(manifest, kind)},
        },
        "build": {
            "created_by": manifest.created_by,
            "seconds": round(seconds, 1),
            "last_commit": max((record.finished_at for record in records), default=None),
            "provenance": records[-1].provenance if records else {},
        },
        "digests": manifest.digests(),
    }


def summary_lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """Name and value of each line of the screen."""
    done, planned = facts["trajectories"]["committed"], facts["trajectories"]["planned"]
    prompts, sampling, storage = facts["prompts"], facts["sampling"], facts["storage"]
    guidance = sampling["guidance"]
    sources = ", ".join(f"{name} {count:,}" for name, count in prompts["sources"].items())
    seconds = facts["build"]["seconds"]
    return [
        ("cache", f"{facts['path']} ({facts['state']})"),
        (
            "teacher",
            f"{facts['teacher']['source']}, {facts['teacher']['text_length']} text tokens of width "
            f"{facts['teacher']['text_width']}, pooled {facts['teacher']['pooled']}",
        ),
        ("prompts", f"{prompts['count']:,} ({sources}); {prompts['held_out']:,} held out"),
        ("trajectories", f"{done:,} of {planned:,} committed"),
        ("images", f"{sampling['size']} pixels, {sampling['image_tokens']} tokens x {sampling['channels']} channels"),
        (
            "schedule",
            f"{sampling['schedule']}, {sampling['steps']} steps, sigma {sampling['sigmas'][0]:.3f} to "
            f"{sampling['sigmas'][1]:.3f}",
        ),
        ("guidance", "none" if guidance is None else ", ".join(f"{value:g}" for value in guidance)),
        (
            "seed, dtype",
            f"{sampling['seed']}, {sampling['dtype']}"
            + (f", {sampling['quantize']} weights" if sampling["quantize"] != "none" else ""),
        ),
        (
            "on disk",
            f"{size_text(storage['bytes'])} ({storage['format']}, {storage['codec']}, latents "
            f"{storage['latents']}, embeddings {storage['embeddings']}); arrays raw {size_text(storage['raw_bytes'])}",
        ),
        (
            "built",
            f"in {seconds:.0f} s of work"
            + (f", {done / seconds:.2f} trajectories/s" if seconds else "")
            + f", last commit {facts['build']['last_commit']}, by {facts['build']['created_by']}",
        ),
        ("digests", ", ".join(f"{name} {value[:12]}" for name, value in facts["digests"].items())),
    ]

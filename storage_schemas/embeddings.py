"""Embedding shards of a cache that does not keep them: there while it is built, gone before it is finished."""

from pathlib import Path

from storage_schemas import durable
from storage_schemas.commits import COMMITS_FOLDER


def drop_embeddings(cache: Path) -> None:
    """Delete all embedding shards: records first, so that none ever names a file that is gone. May be repeated."""
    commits = cache / COMMITS_FOLDER
    with durable.locked(commits):
        records = list(commits.glob("embeddings-*.json"))
        for record in records:
            record.unlink(missing_ok=True)
        if records:
            durable.sync(commits)
        for folder in (cache / "embeddings.zarr", cache / "embeddings"):
            for file in folder.rglob("*"):
                # The metadata stays: the manifest vouches for it, and whoever samples a shard anew writes by it.
                if file.is_file() and file.name != "zarr.json":
                    file.unlink(missing_ok=True)

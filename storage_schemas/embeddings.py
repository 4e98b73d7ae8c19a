"""Embedding shards of a cache that does not keep them: there while it is built, gone before it is finished."""

from secondcast.storage_schemas.io.folders import Folder
from secondcast.storage_schemas.schema.commits import COMMITS_FOLDER


def drop_embeddings(folder: Folder) -> None:
    """Delete all embedding shards: records first, so that none ever names a file that is gone. May be repeated."""
    with folder.claimed(f"{COMMITS_FOLDER}/embeddings"):
        for name in folder.names(COMMITS_FOLDER):
            if name.startswith(f"{COMMITS_FOLDER}/embeddings-"):
                folder.remove(name)
        for top in ("embeddings.zarr", "embeddings"):
            for name in folder.names(top):
                # The metadata stays: the manifest vouches for it, and whoever samples a shard anew writes by it.
                if not name.endswith("zarr.json"):
                    folder.remove(name)

"""Embedding shards of a cache that does not store them: they exist while it is built and are deleted at the end."""

import re

from secondcast.storage_schemas.io.folders import Folder
from secondcast.storage_schemas.schema.commits import COMMITS_FOLDER

# The metadata of the arrays stays: the manifest has its checksums, and resampling a shard needs it.
_OF_A_SHARD = re.compile(r"embeddings\.zarr/\w+/c(/\d+)+|embeddings/\d{6,}\.(tar|index\.json)")


def drop_embeddings(folder: Folder) -> None:
    """Delete all embedding shards: records first, so that no record names a deleted file. Idempotent."""
    with folder.lock(f"{COMMITS_FOLDER}/embeddings"):
        for name in folder.names(COMMITS_FOLDER):
            if name.startswith(f"{COMMITS_FOLDER}/embeddings-"):
                folder.remove(name)
        for top in ("embeddings.zarr", "embeddings"):
            for name in filter(_OF_A_SHARD.fullmatch, folder.names(top)):
                folder.remove(name)

"""Which shard format a manifest names."""

from secondcast.storage_schemas.formats.shard_format import ShardFormat
from secondcast.storage_schemas.schema.manifest import Manifest


def format_of(manifest: Manifest, *, metadata: dict[str, bytes] | None = None) -> ShardFormat:
    """The format that a manifest names."""
    if manifest.storage.format == "zarr":
        # Imported on use: zarr takes 0.3 s to import, and a cache of tars does not need it.
        from secondcast.storage_schemas.formats.zarr import ZarrFormat

        return ZarrFormat(manifest, metadata=metadata or None)
    from secondcast.storage_schemas.formats.webdataset import WebDatasetFormat

    return WebDatasetFormat(manifest)

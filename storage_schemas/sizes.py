"""Size of a cache from its manifest alone: raw bytes exactly, stored bytes as an estimated range."""

from collections.abc import Mapping
from dataclasses import dataclass

from secondcast.storage_schemas.schema.commits import Kind, Records
from secondcast.storage_schemas.schema.fields import Field, fields_of, kinds_of
from secondcast.storage_schemas.schema.layout import Layout
from secondcast.storage_schemas.schema.manifest import Manifest
from secondcast.storage_schemas.schema.recording import CodecName

# Measured: stored by raw bytes (docs/benchmarks.md, "Codecs"; synthetic signals of 0.5 to 8 % drift per step and the
# pocket's predictions; real FLUX predictions: unknown until a pilot). `none` is exact. latents: from runs with int8.
# pooled_projections, clip_hidden_states: not measured; from the ratio of embeddings to no gain.
_Ratios = Mapping[str, tuple[float, float]]
_RATIOS: dict[str, _Ratios] = {
    "bfloat16": {
        "velocity": (0.34, 0.57),
        "velocity int8": (0.18, 0.33),
        "hidden_states": (0.18, 0.29),
        "noise": (0.68, 0.70),
        "final_latent": (0.68, 0.70),
        "encoder_hidden_states": (0.67, 0.70),
        "pooled_projections": (0.67, 1.0),
        "clip_hidden_states": (0.67, 1.0),
    },
    "float32": {
        "velocity": (0.72, 0.74),
        "velocity int8": (0.13, 0.15),
        "hidden_states": (0.62, 0.65),
        "noise": (0.84, 0.86),
        "final_latent": (0.84, 0.86),
        "encoder_hidden_states": (0.83, 0.86),
        "pooled_projections": (0.83, 1.0),
        "clip_hidden_states": (0.83, 1.0),
    },
}
# Measured: prompts.jsonl and .offsets of a million prompts take 252 bytes per prompt ("Opening a cache").
_PROMPT_BYTES = 252
# A commit record file plus its line in the index.
_RECORD_BYTES = 2_000
# A Zarr chunk's entry in the shard's index; a tar sample's headers, padding, label and entry of the byte index.
_ROW_BYTES = {"zarr": 24, "webdataset": 2_900}


@dataclass(frozen=True, kw_only=True)
class Size:
    """Bytes of one array (or kind of file) of a finished cache.

    rows: number of trajectories, prompts or shards.
    raw_bytes: uncompressed, exact for arrays.
    stored_low_bytes, stored_high_bytes: the estimated range on disk.
    """

    name: str
    rows: int
    raw_bytes: int
    stored_low_bytes: int
    stored_high_bytes: int

    @property
    def row_bytes(self) -> float:
        """Raw bytes of one row."""
        return self.raw_bytes / self.rows if self.rows else 0.0


def stored_ratio(field: Field, codec: CodecName) -> tuple[float, float]:
    """Lowest and highest measured ratio of stored to raw bytes of an array."""
    if codec == "none" or field.name == "guidance":
        return 1.0, 1.0
    ratios = _RATIOS[field.dtype.name]
    return ratios[f"{field.name} int8" if codec == "int8" and field.name == "velocity" else field.name]


def cache_sizes(manifest: Manifest) -> list[Size]:
    """All arrays of the cache that a manifest describes, then its prompts, then its records and format overhead."""
    layout, storage = Layout(manifest.prompts.segments), manifest.storage
    counts: dict[Kind, int] = {"trajectories": len(layout), "embeddings": layout.embeddings.items}
    if not manifest.keeps_embeddings:
        counts["embeddings"] = 0
    sizes = [
        _array_size(field, counts[kind], storage.compression)
        for kind in kinds_of(manifest)
        for field in fields_of(manifest, kind)
    ]
    prompts = manifest.prompts.count
    shards = len(layout.trajectories) + (len(layout.embeddings) if counts["embeddings"] else 0)
    # A tar has a sample per row, Zarr a chunk per row and array.
    tars = storage.format == "webdataset"
    parts = sum(counts[kind] * (1 if tars else len(fields_of(manifest, kind))) for kind in kinds_of(manifest))
    added = shards * _RECORD_BYTES + parts * _ROW_BYTES[storage.format]
    return [*sizes, _exact("prompts", prompts, prompts * _PROMPT_BYTES), _exact("records", shards, added)]


def remaining_bytes(manifest: Manifest, records: Records) -> tuple[int, int]:
    """Range of the bytes that the missing shards will take, embedding shards included.

    Extrapolated from the committed shards of the same kind where there are any, else from the estimate.
    """
    layout, storage = Layout(manifest.prompts.segments), manifest.storage
    planned: dict[Kind, int] = {"trajectories": len(layout), "embeddings": layout.embeddings.items}
    if planned["trajectories"] == records.rows("trajectories") and not manifest.keeps_embeddings:
        # Embeddings that are not stored are made only for the missing trajectories.
        planned["embeddings"] = records.rows("embeddings")
    low = high = 0.0
    for kind in kinds_of(manifest):
        done, missing = records.rows(kind), max(0, planned[kind] - records.rows(kind))
        if done and missing:
            found = missing * _committed_bytes(records, kind) / done
            low, high = low + found, high + found
        elif missing:
            sizes = [_array_size(field, missing, storage.compression) for field in fields_of(manifest, kind)]
            low += sum(size.stored_low_bytes for size in sizes)
            high += sum(size.stored_high_bytes for size in sizes)
    return int(low), int(high)


def _committed_bytes(records: Records, kind: Kind) -> int:
    return sum(file.bytes for record in records.values() if record.kind == kind for file in record.files)


def _array_size(field: Field, rows: int, codec: CodecName) -> Size:
    raw = rows * field.row_bytes
    low, high = stored_ratio(field, codec)
    return Size(
        name=field.name, rows=rows, raw_bytes=raw, stored_low_bytes=int(raw * low), stored_high_bytes=int(raw * high)
    )


def _exact(name: str, rows: int, count: int) -> Size:
    return Size(name=name, rows=rows, raw_bytes=count, stored_low_bytes=count, stored_high_bytes=count)

"""The consequence of a difference between two caches, in plain words, by field name."""

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


def consequence(field: str) -> str:
    """The consequence if two caches differ in a field of the manifest (`sampling.seed`) or in `provenance.x`."""
    for beginning, follows in _FOLLOWS:
        if field == beginning or field.startswith(f"{beginning}."):
            return follows
    return "informational only: no consequence"

"""What follows from a difference between two caches, in plain words, by the name of the field."""

_FOLLOWS = (
    ("teacher", "another teacher: the two can neither train one student together nor be merged"),
    (
        "sampling.storage.codec",
        "other compression: `secondcast convert` makes them equal (int8 rounds: only towards it)",
    ),
    (
        "sampling.storage.embeddings",
        "one keeps no embeddings: `secondcast convert --no-store-embeddings` makes them equal",
    ),
    ("sampling.storage", "the same recording in other files: `secondcast convert` makes them equal"),
    ("sampling.quantize", "other weights of the teacher: the two can neither train one student together nor be merged"),
    ("sampling.seed", "other noise: the two can train one student together, but not be merged"),
    ("sampling", "other trajectories: the two can train one student together, but not be merged"),
    ("prompts", "other prompts, or another order or cut of them: no hindrance to a merge"),
    ("metadata", "another version of zarr-python worded it: nothing follows for the numbers"),
    ("provenance", "made by other versions or on another machine: equal bytes are not promised"),
)


def consequence(field: str) -> str:
    """What follows if two caches differ in a field of the manifest (`sampling.seed`) or in `provenance.x`."""
    for beginning, follows in _FOLLOWS:
        if field == beginning or field.startswith(f"{beginning}."):
            return follows
    return "for people only: nothing follows"

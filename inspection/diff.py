"""`inspect diff`: the fields in which two caches differ, with consequences. Reads manifests and records; no torch."""

from typing import Any

from secondcast.storage_schemas.io.digests import canonical_json
from secondcast.storage_schemas.maintenance.rewrite import ways_made
from secondcast.storage_schemas.progress import counted
from secondcast.storage_schemas.reader import Cache
from secondcast.storage_schemas.schema.commits import CommitRecord, Records
from secondcast.storage_schemas.schema.comparing import consequence, differences, differing_fields
from secondcast.storage_schemas.schema.first_difference import differing_leaves

# Lines per field: sigmas, timesteps and segments are lists.
_MOST_LEAVES = 3
_DIGEST_OF_VERDICT = {"resume": "prompts", "merge": "recording", "train_together": "teacher"}


def compare(a: Cache, b: Cache) -> dict[str, Any]:
    """Differences of two caches with consequences, verdicts, and the number of equal shards; plain JSON types.

    `shards` is None if the manifests differ, since no shards can then be equal.
    """
    digests_a, digests_b = (
        cache.manifest.digests() | {"recording": cache.manifest.recording_digest()} for cache in (a, b)
    )
    equal = {name: digests_a[name] == digests_b[name] for name in _DIGEST_OF_VERDICT.values()}
    fields = [*differing_fields(a.manifest, b.manifest)]
    # Different quantization counts as different teachers.
    kinds = [cache.manifest.sampling.quantize for cache in (a, b) if not cache.manifest.is_text]
    as_exact = len(set(kinds)) < 2
    # zarr.json contains the number of rows and the layout, so a difference in it adds nothing.
    rest = ("source", "created_by", *(("metadata",) if equal["prompts"] else ()))
    for name in rest:
        fields += differences(getattr(a.manifest, name), getattr(b.manifest, name), name)
    fields += differences(_provenances(a.records), _provenances(b.records), "provenance")
    shards = _shards(a.records, b.records) if equal["prompts"] else None
    same_files = shards is not None and not (shards["other_bytes"] or shards["only_in_a"] or shards["only_in_b"])
    return {
        "a": str(a.folder),
        "b": str(b.folder),
        "identical": same_files and a.manifest == b.manifest,
        "differences": [
            {"field": field, "a": value_a, "b": value_b, "follows": consequence(field)}
            for field, value_a, value_b in fields
        ],
        "shards": shards,
        "verdicts": {verdict: equal[name] and as_exact for verdict, name in _DIGEST_OF_VERDICT.items()},
    }


def diff_lines(facts: dict[str, Any]) -> list[str]:
    """The printed lines: one per difference, one on the shards, one with verdicts."""
    lines = [line for found in facts["differences"] for line in _difference_lines(found)]
    if facts["identical"]:
        lines.append(
            "identical by their records: the same manifest and the same checksums of every shard; the files were not "
            "read (`secondcast inspect verify` does)"
        )
    elif (shards := facts["shards"]) is not None:
        lines.append(
            f"shards: {shards['equal']} equal, {shards['other_bytes']} with other bytes, "
            f"{shards['only_in_a']} only in {facts['a']}, {shards['only_in_b']} only in {facts['b']}"
        )
    verdicts = (f"{name.replace('_', ' ')}: {'yes' if can else 'no'}" for name, can in facts["verdicts"].items())
    return [*lines, f"can {', '.join(verdicts)}"]


def _difference_lines(found: dict[str, Any]) -> list[str]:
    """A line for each of the first differing values of a field, and one for the rest."""
    leaves = list(differing_leaves(found["a"], found["b"], found["field"]))
    lines = [f"{leaf.path}: {leaf.one} | {leaf.other}: {found['follows']}" for leaf in leaves[:_MOST_LEAVES]]
    if (more := len(leaves) - _MOST_LEAVES) > 0:
        lines.append(f"{found['field']}: and {counted(more, 'further difference')}; --json shows both values in full")
    return lines


def _provenances(records: Records) -> dict[str, Any]:
    """Each key's value, or all its distinct values, without the locations that rows were copied from."""
    values: dict[str, dict[bytes, Any]] = {}
    for record in records.values():
        for way in ways_made(record.provenance):
            for key, value in way.items():
                values.setdefault(key, {})[canonical_json(value)] = value
    return {
        key: next(iter(found.values())) if len(found) == 1 else [found[text] for text in sorted(found)]
        for key, found in values.items()
    }


def _shards(a: Records, b: Records) -> dict[str, int]:
    both = [key for key in a if key in b]
    equal = sum(_checksums(a[key]) == _checksums(b[key]) for key in both)
    return {
        "equal": equal,
        "other_bytes": len(both) - equal,
        "only_in_a": len(a) - len(both),
        "only_in_b": len(b) - len(both),
    }


def _checksums(record: CommitRecord) -> dict[str, str]:
    return {file.path: file.xxh3_128 for file in record.files}

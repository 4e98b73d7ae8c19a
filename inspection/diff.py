"""`inspect diff`: in which fields two caches differ and what follows from it. Reads manifests and records; no torch."""

from typing import Any

from secondcast.storage_schemas.io.digests import canonical_json
from secondcast.storage_schemas.maintenance.rewrite import ways_made
from secondcast.storage_schemas.progress import counted
from secondcast.storage_schemas.reader import Cache
from secondcast.storage_schemas.schema.commits import CommitRecord, Records
from secondcast.storage_schemas.schema.consequences import consequence
from secondcast.storage_schemas.schema.first_difference import differing_leaves
from secondcast.storage_schemas.schema.manifest import differences, differing_fields

# Lines of one field: sigmas, timesteps and generations are lists.
_MOST_LEAVES = 3
_DIGEST_OF_VERDICT = {"resume": "prompts", "merge": "sampling", "train_together": "teacher"}


def compare(a: Cache, b: Cache) -> dict[str, Any]:
    """The differences of two caches with what follows, the verdicts, and how many shards are equal; plain JSON types.

    `shards` is None where the manifests differ, for then no shard is like another.
    """
    digests_a, digests_b = a.manifest.digests(), b.manifest.digests()
    equal = {name: digests_a[name] == digests_b[name] for name in digests_a}
    fields = [*differing_fields(a.manifest, b.manifest)]
    # Of one teacher, and yet of two.
    as_exact = a.manifest.sampling.quantize == b.manifest.sampling.quantize
    # zarr.json states the number of rows and the layout: it differs with them and tells nothing new.
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
    """What is printed: a line per difference, a line on the shards, a line of verdicts."""
    lines = [line for found in facts["differences"] for line in _difference_lines(found)]
    if facts["identical"]:
        lines.append(
            "identical by their records: the same manifest, and the same checksums of every shard; the files were not "
            "read, `secondcast inspect verify` does"
        )
    elif (shards := facts["shards"]) is not None:
        lines.append(
            f"shards: {shards['equal']} equal, {shards['other_bytes']} with other bytes, "
            f"{shards['only_in_a']} only in {facts['a']}, {shards['only_in_b']} only in {facts['b']}"
        )
    verdicts = (f"{name.replace('_', ' ')}: {'yes' if can else 'no'}" for name, can in facts["verdicts"].items())
    return [*lines, f"can {', '.join(verdicts)}"]


def _difference_lines(found: dict[str, Any]) -> list[str]:
    """A line for each of the first values in which a field differs, and one for the rest."""
    leaves = list(differing_leaves(found["a"], found["b"], found["field"]))
    lines = [f"{leaf.path}: {leaf.one} | {leaf.other}: {found['follows']}" for leaf in leaves[:_MOST_LEAVES]]
    if (more := len(leaves) - _MOST_LEAVES) > 0:
        lines.append(f"{found['field']}: and {counted(more, 'further difference')}; --json shows both values whole")
    return lines


def _provenances(records: Records) -> dict[str, Any]:
    """Each key's value, or all its distinct values; where rows were copied from says nothing about their making."""
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

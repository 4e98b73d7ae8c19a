"""The text output of `inspect summary`, from its facts."""

from collections.abc import Sequence
from typing import Any

from secondcast.inspection.text_layout import entry_lines, table_lines
from secondcast.storage_schemas.progress import counted, duration_text, size_text

# Provenances shown; the others are counted, and --json has all.
_WAYS_SHOWN = 3
_NAMED_BEFORE = ("device", "attention", "batch_size", "threads", "quantizer", "shards")


def screen_lines(facts: dict[str, Any], *, width: int | None = None) -> list[str]:
    """The whole output; width: of the terminal, None for a file or a pipe."""
    arrays = facts["storage"]["arrays"]
    table = ["", *(f"  {line}" for line in _array_lines(arrays))] if arrays else []
    return [*entry_lines(summary_lines(facts), width=width), *table]


def summary_lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """Name and value of each entry."""
    prompts, storage, build = facts["prompts"], facts["storage"], facts["build"]
    latents = "" if facts["sampling"] is None else f", latents {storage['latents']}"
    sources = ", ".join(f"{name} {count:,}" for name, count in prompts["sources"].items())
    return [
        ("cache", f"{facts['path']} ({facts['state']})"),
        (
            "teacher",
            f"{facts['teacher']['source']}, {counted(facts['teacher']['text_length'], 'text token')} of width "
            f"{facts['teacher']['text_width']}, pooled {facts['teacher']['pooled']}"
            + (", padding masked" if facts["teacher"]["padding"] == "masked" else ""),
        ),
        ("prompts", f"{prompts['count']:,} ({sources}); {prompts['held_out']:,} held out"),
        *(_sampling_lines(facts) if facts["sampling"] is not None else _text_lines(facts)),
        (
            "on disk",
            f"{size_text(storage['bytes'])} ({storage['format']}, {storage['compression']}{latents}, embeddings "
            f"{storage['embeddings']}); arrays raw {size_text(storage['raw_bytes'])}",
        ),
        ("integrity", _integrity(facts)),
        ("built", _built(build)),
        *([("speed", _speed(build))] if facts["sampling"] is not None else []),
        ("digests", ", ".join(f"{name} {value}" for name, value in facts["digests"].items())),
    ]


def _text_lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    rows = max((array["rows"] for array in facts["storage"]["arrays"]), default=0)
    return [
        ("trajectories", "none: a text cache, for the embedding and context losses"),
        ("embeddings", f"{rows:,} of {facts['prompts']['count']:,} committed, {facts['storage']['dtype']}"),
    ]


def _sampling_lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    done, planned = facts["trajectories"]["committed"], facts["trajectories"]["planned"]
    sampling, guidance = facts["sampling"], facts["sampling"]["guidance"]
    share = "" if done == planned else f" ({100 * done / planned:.1f} %)"
    return [
        ("trajectories", f"{done:,} of {planned:,} committed{share}"),
        (
            "images",
            f"{sampling['size']} pixels, {counted(sampling['image_tokens'], 'token')} x "
            f"{counted(sampling['channels'], 'channel')}",
        ),
        (
            "schedule",
            f"{sampling['schedule']}, {counted(sampling['steps'], 'step')}, sigma {sampling['sigmas'][0]:.3f} to "
            f"{sampling['sigmas'][1]:.3f}",
        ),
        ("guidance", "none" if guidance is None else ", ".join(f"{value:g}" for value in guidance)),
        (
            "seed, dtype",
            f"{sampling['seed']}, {sampling['dtype']}"
            + (f", {sampling['quantize']} weights" if sampling["quantize"] != "none" else ""),
        ),
    ]


def _integrity(facts: dict[str, Any]) -> str:
    shards, files = facts["integrity"]["shards"], facts["integrity"]["files"]
    verify = f"`secondcast inspect verify {facts['path']}` does"
    return (
        f"{shards['committed']:,} of {shards['planned']:,} shards have a record; {_files(files)}; checksums not "
        f"compared ({verify})"
    )


def _files(files: dict[str, Any]) -> str:
    looked_at, recorded = files["looked_at"], files["recorded"]
    if not recorded:
        return "no files yet"
    if not looked_at:
        return f"{counted(recorded, 'file')} not checked"
    which = (
        f"all {counted(recorded, 'file')}" if looked_at == recorded else f"{looked_at:,} of {recorded:,} files checked,"
    )
    wrong = [f"{files[key]:,} {text}" for key, text in (("missing", "missing"), ("other_size", "with another size")) if
             files[key]]  # fmt: skip
    if not wrong:
        return f"{which} present with the recorded sizes"
    return f"of {looked_at:,} files checked, {' and '.join(wrong)}, the first {files['first_wrong']}"


def _built(build: dict[str, Any]) -> str:
    last = "" if build["last_commit"] is None else f", last commit {build['last_commit']}"
    ways = [_way(way, with_shards=len(build["ways"]) > 1) for way in build["ways"]]
    more = [counted(len(ways) - _WAYS_SHOWN, "further way")] if len(ways) > _WAYS_SHOWN else []
    return "; ".join([f"by {build['created_by']}{last}", *ways[:_WAYS_SHOWN], *more])


def _way(way: dict[str, Any], *, with_shards: bool) -> str:
    """Device and settings with which shards were made."""
    details = []
    for key, text in (("attention", "attention {}"), ("batch_size", "batch size {}"), ("threads", "threads {}"),
                      ("quantizer", "{}")):  # fmt: skip
        if key in way:
            details.append(text.format(way[key]))
    details += [f"{key} {value}" for key, value in _flat(way) if key not in _NAMED_BEFORE]
    shards = f"{counted(way['shards'], 'shard')} " if with_shards else ""
    return f"{shards}on {way.get('device', 'an unnamed device')}" + (f" ({', '.join(details)})" if details else "")


def _flat(way: dict[str, Any]) -> list[tuple[str, Any]]:
    return [
        pair for key, value in way.items() for pair in (value.items() if isinstance(value, dict) else ((key, value),))
    ]


def _speed(build: dict[str, Any]) -> str:
    if build["copied_from"]:
        places = ", ".join(build["copied_from"])
        return f"copied in {duration_text(build['seconds'])} from {places}; the recording speed is in their summaries"
    if build["trajectories_per_hour"] is None:
        return "nothing is recorded yet" if build["last_commit"] is None else "unknown from the records"
    workers = {None: "", 1: " by one worker at a time"}.get(
        build["workers"], f" by {build['workers']} workers at a time on average"
    )
    return (
        f"{build['trajectories_per_hour']:,.0f} trajectories per hour over {duration_text(build['busy_seconds'])}"
        f"{workers}; {duration_text(build['seconds'])} of work, text included"
    )


def _array_lines(arrays: Sequence[dict[str, Any]]) -> list[str]:
    sampled = max(array["sampled"] for array in arrays)
    rows = [
        [
            array["name"],
            f"{array['rows']:,}",
            _stored(array),
            size_text(array["raw_bytes"]),
            "?" if array["stored_per_raw_ratio"] is None else f"{array['stored_per_raw_ratio']:.3f}",
        ]
        for array in arrays
    ]
    lines = table_lines(["array", "rows", "stored", "raw", "stored / raw"], rows)
    if sampled:
        lines.append(
            f"~: extrapolated from the headers of {counted(sampled, 'sample')}; a tar's record has one size for all"
        )
    if any(array["stored_bytes"] is None for array in arrays):
        lines.append("?: the headers of the samples are unreadable")
    return lines


def _stored(array: dict[str, Any]) -> str:
    if array["stored_bytes"] is None:
        return "?"
    return ("~ " if array["sampled"] else "") + size_text(array["stored_bytes"])

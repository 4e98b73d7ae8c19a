"""Extends a cache by prompts or samples: existing data stays unchanged, new shards are appended."""

from contextlib import suppress
from dataclasses import dataclass

from secondcast.storage_schemas.errors import DamagedCacheError, NotACacheError, SettingsError
from secondcast.storage_schemas.formats.by_manifest import format_of
from secondcast.storage_schemas.io.digests import xxh3_128
from secondcast.storage_schemas.io.folders import Folder
from secondcast.storage_schemas.progress import Progress, counted
from secondcast.storage_schemas.reader import prompt_table, read_manifest
from secondcast.storage_schemas.schema.comparing import RECORDING, check_same_settings
from secondcast.storage_schemas.schema.journal import finish_pending_locked, locked_manifest, replace_together
from secondcast.storage_schemas.schema.layout import Layout
from secondcast.storage_schemas.schema.manifest import MANIFEST_FILE, Manifest, PromptSet
from secondcast.storage_schemas.schema.prompts import OFFSETS_FILE, PROMPTS_FILE, Prompt, encode_prompts, offset_table
from secondcast.storage_schemas.schema.segments import added_segments, samples_per_prompt_of
from secondcast.storage_schemas.writer import CacheWriter, prompt_set_fields

MOST_SCATTERED = 4
"""Largest ratio of the shards that an extension adds to the fewest that would hold its trajectories."""


def extend(
    folder: Folder, wanted: Manifest, prompts: list[Prompt], tokenizer_files: dict[str, bytes], progress: Progress
) -> CacheWriter:
    """Extend the plan of a cache by the prompts and samples of `wanted`; return the writer of the extended cache.

    If everything is already planned, nothing changes, so that the same call resumes after an interruption. Existing
    prompts keep their number and their line of prompts.jsonl, byte for byte: the names of further sources are not
    added. Shards have the size of the first segment's.
    Raises NotACacheError if there is no cache, SettingsMismatchError for another teacher or sampling, ShardLockedError
    while another builder extends the cache.
    """
    if folder.size(MANIFEST_FILE) is None:
        raise NotACacheError(
            f"{folder} has no {MANIFEST_FILE}: there is no cache to extend; give its folder, or omit --extend to "
            f"create one"
        )
    plan = None
    # While another builder puts an extension in place, files may differ for a moment.
    with suppress(DamagedCacheError):
        plan = _plan(folder, wanted, prompts)
    if plan is None or plan.manifest != plan.base:
        with locked_manifest(folder) as renew:
            finish_pending_locked(folder, renew)
            if plan is None or read_manifest(folder) != plan.base:
                plan = _plan(folder, wanted, prompts)
            if plan.manifest != plan.base:
                plan.check_shards()
                replace_together(folder, plan.manifest, plan.files, renew)
    for line in plan.remarks(wanted):
        progress.say(line)
    return CacheWriter.resume(folder, plan.manifest, plan.prompts, plan.files, tokenizer_files)


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """An extension of a cache.

    base: the manifest in place.
    manifest: its replacement.
    files: the files covered by `manifest`.
    from_elsewhere: existing prompts that `wanted` takes from another source.
    """

    base: Manifest
    manifest: Manifest
    prompts: list[Prompt]
    files: dict[str, bytes]
    from_elsewhere: list[Prompt]

    def check_shards(self) -> None:
        """Raise SettingsError if the additions would fill many small shards: a batch never crosses a shard."""
        was, now = (Layout(manifest.prompts.segments) for manifest in (self.base, self.manifest))
        shards, rows = len(now.trajectories) - len(was.trajectories), len(now) - len(was)
        fewest = -(-rows // now.shard_size)
        if shards > MOST_SCATTERED * fewest + MOST_SCATTERED:
            raise SettingsError(
                f"the extension would add {counted(rows, 'trajectory')} in {counted(shards, 'shard')}, where {fewest} "
                f"would hold them: the prompts with more samples are scattered among the others, and a batch never "
                f"crosses a shard; add samples to all prompts, or build these prompts as a separate cache"
            )

    def remarks(self, wanted: Manifest) -> list[str]:
        """Messages for the user, one line each."""
        was, now = (Layout(manifest.prompts.segments) for manifest in (self.base, self.manifest))
        prompts = counted(len(self.prompts), "prompt")
        if self.manifest == self.base:
            among = prompts if self.base.is_text else f"{counted(len(was), 'trajectory')} of {prompts}"
            lines = [f"nothing to add: everything is among the {among}"]
        elif self.base.is_text:
            new = counted(len(self.prompts) - self.base.prompts.count, "prompt")
            lines = [f"extended by {new}, to {prompts}"]
        else:
            lines = [
                f"extended by {counted(len(now) - len(was), 'trajectory')} and "
                f"{counted(len(self.prompts) - self.base.prompts.count, 'prompt')}, to "
                f"{counted(len(now), 'trajectory')} of {prompts}"
            ]
        asked = wanted.prompts.segments[0].shard_size
        if asked != now.shard_size:
            lines.append(
                f"shards keep the size of the first ones, {counted(now.shard_size, 'row')} (--shard-size is {asked})"
            )
        if self.from_elsewhere:
            first = self.from_elsewhere[0]
            lines.append(
                f"prompts already in the cache from other sources, whose recorded sources are kept: "
                f"{counted(len(self.from_elsewhere), 'prompt')}, the first {first.text!r} from "
                f"{', '.join(first.sources)}"
            )
        return lines


def _plan(folder: Folder, wanted: Manifest, prompts: list[Prompt]) -> _Plan:
    base = read_manifest(folder)
    check_same_settings(base, wanted, str(folder), sections=RECORDING)
    there = list(prompt_table(folder, base, verify="once"))
    lines = folder.read(PROMPTS_FILE, 0, base.prompts.bytes)
    known = {prompt.id: number for number, prompt in enumerate(there)}
    new = [prompt for prompt in prompts if prompt.id not in known]
    numbers = known | {prompt.id: number for number, prompt in enumerate(new, start=len(there))}
    asked = {numbers[prompts[i].id]: bits for i, bits in samples_per_prompt_of(wanted.prompts.segments).items()}
    segments = base.prompts.segments
    size = segments[0].shard_size
    segments += added_segments(samples_per_prompt_of(segments), asked, shard_size=size, text=base.is_text)
    manifest, files = base, _files(base, lines)
    if segments != base.prompts.segments:
        lines += encode_prompts(new)[0]
        stated = prompt_set_fields([*there, *new]) | {"bytes": len(lines), "xxh3_128": xxh3_128(lines)}
        manifest = base.model_copy(update={"prompts": PromptSet(**{**stated, "segments": segments})})
        files = _files(manifest, lines)
        checksums = {name: xxh3_128(data) for name, data in files.items() if name != PROMPTS_FILE}
        manifest = manifest.model_copy(update={"metadata": checksums})
    elsewhere = [
        there[known[prompt.id]]
        for prompt in prompts
        if prompt.id in known and not set(prompt.sources) <= set(there[known[prompt.id]].sources)
    ]
    return _Plan(base=base, manifest=manifest, prompts=[*there, *new], files=files, from_elsewhere=elsewhere)


def _files(manifest: Manifest, lines: bytes) -> dict[str, bytes]:
    """The files covered by a manifest: prompts, their offsets, metadata of the format."""
    offsets = offset_table([line + b"\n" for line in lines.split(b"\n")[:-1]])
    return {PROMPTS_FILE: lines, OFFSETS_FILE: offsets, **format_of(manifest).metadata()}

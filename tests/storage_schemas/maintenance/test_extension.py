"""An extended cache holds what a build of everything at once holds; what it held is not touched."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from secondcast.storage_schemas import writer as writer_module
from secondcast.storage_schemas.errors import NotACacheError, SettingsError, SettingsMismatchError
from secondcast.storage_schemas.io.folders import LocalFolder
from secondcast.storage_schemas.maintenance.convert import convert
from secondcast.storage_schemas.maintenance.extend import extend
from secondcast.storage_schemas.maintenance.merge import merge
from secondcast.storage_schemas.maintenance.subset import subset
from secondcast.storage_schemas.maintenance.verify import verify
from secondcast.storage_schemas.progress import Silent
from secondcast.storage_schemas.reader import Cache, read_manifest
from secondcast.storage_schemas.schema.fields import same_bits
from secondcast.storage_schemas.schema.layout import Layout
from secondcast.storage_schemas.schema.manifest import Segment
from secondcast.storage_schemas.schema.prompts import is_held_out
from secondcast.storage_schemas.writer import CacheWriter
from tests.storage_schemas.caches import some_prompts, write_keyed_cache
from tests.storage_schemas.maintenance.extending import TOKENIZER, commit_all, extended, rows, tree, wanted

BOTH = pytest.mark.parametrize("form", ["zarr", "webdataset"])


class Listening(Silent):
    def __init__(self) -> None:
        self.heard: list[str] = []

    def say(self, message):
        self.heard.append(message)


def times(path: Path) -> dict[str, int]:
    return {str(p.relative_to(path)): p.stat().st_mtime_ns for p in path.rglob("*") if p.is_file()}


@pytest.mark.thorough
@BOTH
@pytest.mark.parametrize("latents", ["derived", "stored"])
def test_extended_it_holds_by_key_what_a_build_of_everything_at_once_holds(tmp_path, form, latents):
    prompts = some_prompts(10)
    write_keyed_cache(tmp_path / "c", prompts[:6], format=form, latents=latents)
    before, touched = tree(tmp_path / "c"), times(tmp_path / "c")
    assert commit_all(extended(tmp_path / "c", prompts, samples_per_prompt=3))
    write_keyed_cache(tmp_path / "whole", prompts, samples_per_prompt=3, format=form, latents=latents)
    cache = Cache.open(tmp_path / "c")
    assert cache.finished and len(cache) == 30 and rows(cache) == rows(Cache.open(tmp_path / "whole"))
    assert [p.id for p in cache.prompts] == [p.id for p in prompts]
    assert cache.manifest.prompts.held_out == sum(is_held_out(p.id) for p in prompts)
    changes = {"manifest.json", "prompts.jsonl", "prompts.offsets", "commits/index.json"}
    for name, data in before.items():
        if data is not None and name not in changes and not name.endswith("zarr.json"):
            assert (tmp_path / "c" / name).read_bytes() == data and times(tmp_path / "c")[name] == touched[name], name
    after = tree(tmp_path / "c")
    assert after["prompts.jsonl"].startswith(before["prompts.jsonl"])
    assert after["prompts.offsets"].startswith(before["prompts.offsets"])
    assert not (tmp_path / "c/next").exists() and verify(tmp_path / "c", Silent()).problems == ()


def test_only_what_is_named_grows_and_shards_keep_their_size(tmp_path):
    prompts = some_prompts(9)
    write_keyed_cache(tmp_path / "c", prompts[:6])
    progress = Listening()
    writer = extended(
        tmp_path / "c", [prompts[7], prompts[2], prompts[3]], samples_per_prompt=2, shard_size=64, progress=progress
    )
    assert writer.manifest.prompts.segments[1:] == (
        Segment(first_prompt=2, prompts=2, first_sample=1, samples_per_prompt=1, shard_size=4),
        Segment(first_prompt=6, prompts=1, first_sample=0, samples_per_prompt=2, shard_size=4),
    )
    assert progress.heard == [
        "extended by 4 trajectories and 1 prompt, to 10 trajectories of 7 prompts",
        "shards keep the size of the first ones, 4 rows (--shard-size is 64)",
    ]
    progress = Listening()
    extended(tmp_path / "c", prompts[:4], progress=progress)
    assert progress.heard == ["nothing to add: everything is among the 10 trajectories of 7 prompts"]
    assert commit_all(extended(tmp_path / "c", prompts[:4])) and verify(tmp_path / "c", Silent()).problems == ()


def test_a_prompt_that_comes_again_from_elsewhere_keeps_its_line_and_that_is_said(tmp_path):
    prompts = some_prompts(7)
    write_keyed_cache(tmp_path / "c", prompts[:6])
    before = (tmp_path / "c/prompts.jsonl").read_bytes()
    progress = Listening()
    again = [replace(prompts[4], sources=("other",)), prompts[6]]
    writer = extended(tmp_path / "c", again, progress=progress)
    assert progress.heard[1] == (
        "prompts already in the cache from other sources, whose recorded sources are kept: 1 prompt, the first "
        "'prompt number 4' from made-up"
    )
    assert (tmp_path / "c/prompts.jsonl").read_bytes().startswith(before)
    assert writer.manifest.prompts.sources == {"made-up": 7} and writer.prompts[4].sources == ("made-up",)


def test_another_sampling_and_a_folder_without_a_cache_are_refused(tmp_path):
    prompts = some_prompts(8)
    write_keyed_cache(tmp_path / "c", prompts[:6])
    before = tree(tmp_path / "c")
    with pytest.raises(
        SettingsMismatchError, match=r"c was built with sampling.seed = 0, requested 5: .* another folder$"
    ):
        extended(tmp_path / "c", prompts, seed=5)
    manifest = read_manifest(LocalFolder(tmp_path / "c"))
    asked = wanted(manifest, prompts)
    with pytest.raises(
        SettingsMismatchError, match=r"prompts.count = 6, .* 8: .*; `secondcast build --extend` adds prompts"
    ):
        CacheWriter.create_or_resume(tmp_path / "c", asked, prompts, TOKENIZER)
    assert tree(tmp_path / "c") == before
    with pytest.raises(NotACacheError, match=rf"{tmp_path}/none has no manifest.json: .*, or omit --extend to create"):
        extend(LocalFolder(tmp_path / "none"), manifest, prompts, TOKENIZER, Silent())


def test_an_extension_that_comes_between_is_built_upon(tmp_path, monkeypatch):
    prompts = some_prompts(10)
    write_keyed_cache(tmp_path / "c", prompts[:6])
    from secondcast.storage_schemas.maintenance import extend as extension

    lock = extension.locked_manifest

    def meanwhile(folder):
        monkeypatch.setattr(extension, "locked_manifest", lock)
        extended(tmp_path / "c", prompts[6:8])
        return lock(folder)

    monkeypatch.setattr(extension, "locked_manifest", meanwhile)
    writer = extended(tmp_path / "c", prompts[7:])
    assert [p.id for p in writer.prompts] == [p.id for p in prompts]
    assert commit_all(writer) and len(Cache.open(tmp_path / "c")) == 10


@BOTH
def test_a_builder_of_the_unfinished_first_build_goes_on_beside_an_extension(tmp_path, form):
    prompts = some_prompts(9)
    left_out = (("trajectories", 1), ("embeddings", 1))
    first = write_keyed_cache(tmp_path / "c", prompts[:6], leave_out=left_out, format=form)
    second = extended(tmp_path / "c", prompts)
    # It has all it was asked for, and must not call the extended cache finished.
    assert not commit_all(first) and not (tmp_path / "c/commits/index.json").exists()
    assert commit_all(second) and verify(tmp_path / "c", Silent()).problems == ()
    assert len(rows(Cache.open(tmp_path / "c"))) == 9


def test_files_that_are_written_anew_are_not_those_from_before_an_extension(tmp_path, monkeypatch):
    prompts = some_prompts(9)
    first = write_keyed_cache(tmp_path / "c", prompts[:6])
    (tmp_path / "c/trajectories.zarr/velocity/zarr.json").unlink()
    lock = writer_module.locked_manifest

    def meanwhile(folder):
        monkeypatch.setattr(writer_module, "locked_manifest", lock)
        extended(tmp_path / "c", prompts)
        return lock(folder)

    monkeypatch.setattr(writer_module, "locked_manifest", meanwhile)
    CacheWriter.create_or_resume(tmp_path / "c", first.manifest, prompts[:6], TOKENIZER)
    assert Cache.open(tmp_path / "c").planned == 9 and verify(tmp_path / "c", Silent()).problems == ()


@BOTH
def test_whoever_reads_during_an_extension_goes_on_reading(tmp_path, form):
    prompts = some_prompts(9)
    write_keyed_cache(tmp_path / "c", prompts[:6], format=form)
    expected = rows(Cache.open(tmp_path / "c"))
    reader = Cache.open(tmp_path / "c")
    commit_all(extended(tmp_path / "c", prompts, samples_per_prompt=2))
    assert rows(reader) == expected and [p.id for p in reader.prompts] == [p.id for p in prompts[:6]]


def test_opening_while_the_files_change_opens_what_has_come(tmp_path, monkeypatch):
    prompts = some_prompts(9)
    write_keyed_cache(tmp_path / "c", prompts[:6])
    from secondcast.storage_schemas import reader

    read = reader.read_records

    def meanwhile(folder):
        monkeypatch.setattr(reader, "read_records", read)
        extended(tmp_path / "c", prompts)
        return read(folder)

    monkeypatch.setattr(reader, "read_records", meanwhile)
    assert Cache.open(tmp_path / "c").planned == 9


@pytest.mark.thorough
@BOTH
def test_an_extended_cache_is_converted_cut_down_and_merged_like_any_other(tmp_path, form):
    prompts = some_prompts(9)
    write_keyed_cache(tmp_path / "c", prompts[:6], format=form)
    commit_all(extended(tmp_path / "c", prompts[2:], samples_per_prompt=2))
    commit_all(extended(tmp_path / "c", prompts[:2], samples_per_prompt=3))
    cache = Cache.open(tmp_path / "c")
    expected = rows(cache)
    assert len(expected) == 20 and len(cache.manifest.prompts.segments) == 4
    other = "webdataset" if form == "zarr" else "zarr"
    convert(cache, tmp_path / "converted", Silent(), format=other)
    write_keyed_cache(tmp_path / "more", some_prompts(11)[8:], format=form)
    merge([cache, Cache.open(tmp_path / "more")], tmp_path / "merged", Silent())
    subset(cache, tmp_path / "cut", Silent(), listed=[prompts[1].id, prompts[7].id])
    assert rows(Cache.open(tmp_path / "converted")) == expected
    assert rows(Cache.open(tmp_path / "merged")) == expected | rows(Cache.open(tmp_path / "more"))
    kept = {key: row for key, row in expected.items() if key[:32] in (prompts[1].id, prompts[7].id)}
    assert rows(Cache.open(tmp_path / "cut")) == kept and len(kept) == 5
    for name in ("c", "converted", "merged", "cut"):
        assert verify(tmp_path / name, Silent()).problems == () and Cache.open(tmp_path / name).finished


@pytest.mark.parametrize("name", ["zarr-lossless", "webdataset-int8"])
def test_a_version_1_cache_extended_gives_its_records_as_before(tmp_path, name):
    shutil.copytree(Path(__file__).parents[1] / "version_1" / name, tmp_path / "c")
    old = Cache.open(tmp_path / "c")
    expected, prompts = rows(old), list(old.prompts)
    asked = old.manifest.prompts.segments[0].model_copy(update={"samples_per_prompt": 2})
    manifest = old.manifest.model_copy(
        update={"prompts": old.manifest.prompts.model_copy(update={"segments": (asked,)})}
    )
    extend(LocalFolder(tmp_path / "c"), manifest, prompts, old.tokenizer_files, Silent())
    now = Cache.open(tmp_path / "c")
    assert now.planned > len(now) == len(expected) and rows(now) == expected
    assert same_bits(now.embedding(0), old.embedding(0)) and verify(tmp_path / "c", Silent()).problems == ()


def test_a_trajectory_shard_knows_the_embedding_shards_it_needs():
    segments = (
        Segment(first_prompt=0, prompts=7, first_sample=0, samples_per_prompt=3, shard_size=4),
        Segment(first_prompt=5, prompts=6, first_sample=3, samples_per_prompt=2, shard_size=4),
        Segment(first_prompt=10, prompts=2, first_sample=5, samples_per_prompt=6, shard_size=4),
    )
    layout = Layout(segments)
    for shard in layout.trajectories:
        items = range(shard.first, shard.first + shard.rows)
        assert layout.embedding_shards_of(shard) == {layout.embedding_place(layout.place(i).prompt)[0] for i in items}


def test_an_extension_into_many_tiny_shards_is_refused_before_anything_changes(tmp_path):
    prompts = some_prompts(60)
    write_keyed_cache(tmp_path / "c", prompts, shard_size=64)
    before = tree(tmp_path / "c")
    with pytest.raises(SettingsError) as caught:
        extended(tmp_path / "c", prompts[::2], samples_per_prompt=2)
    assert str(caught.value) == (
        "the extension would add 30 trajectories in 30 shards, where 1 would hold them: the prompts with more samples "
        "are scattered among the others, and a batch never crosses a shard; add samples to all prompts, or build "
        "these prompts as a separate cache"
    )
    assert tree(tmp_path / "c") == before

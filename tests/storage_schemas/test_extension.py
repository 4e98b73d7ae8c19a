"""A cache is extended whole or not at all, whatever interrupts; what it held is not touched, by whomever it is read."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from storage_schemas import journal
from storage_schemas.convert import convert
from storage_schemas.digests import xxh3_128
from storage_schemas.errors import DamagedCache, ExtensionPending, NotACache, SettingsDiffer, ShardTaken
from storage_schemas.extension import extend
from storage_schemas.fields import same_bits
from storage_schemas.folders import Folder, LocalFolder, open_folder
from storage_schemas.layout import Layout
from storage_schemas.manifest import Generation
from storage_schemas.merge import merge
from storage_schemas.object_folder import ObjectFolder
from storage_schemas.progress import Silent
from storage_schemas.prompts import is_held_out
from storage_schemas.reader import Cache, read_manifest
from storage_schemas.repair import mend
from storage_schemas.subset import subset
from storage_schemas.verification import verify
from storage_schemas.writer import CacheWriter
from tests.storage_schemas.caches import keyed_arrays, some_manifest, some_prompts, write_keyed_cache

BOTH = pytest.mark.parametrize("form", ["zarr", "webdataset"])
TOKENIZER = {"spiece.model": b"pieces"}
STAGED = {"zarr": 9, "webdataset": 2}


class Listening(Silent):
    def __init__(self) -> None:
        self.heard: list[str] = []

    def say(self, message):
        self.heard.append(message)


class Killed(Exception):
    pass


class Mortal:
    """Lets so many writes through, then none."""

    left = 10**6

    def _live(self):
        self.left -= 1
        if self.left < 0:
            raise Killed

    def replace(self, path, data):
        self._live()
        super().replace(path, data)

    def publish(self, path, data):
        if not path.startswith("claims/"):
            self._live()
        return super().publish(path, data)

    def remove(self, path):
        if not path.startswith("claims/"):
            self._live()
        super().remove(path)


class MortalLocal(Mortal, LocalFolder):
    pass


class MortalObjects(Mortal, ObjectFolder):
    pass


def wanted(cache: Cache | CacheWriter, prompts, **changes):
    """The manifest of a build with the flags of a cache's first one, but for these prompts and changes."""
    manifest = some_manifest(prompts, **changes)
    sampling = manifest.sampling.model_copy(update={"storage": cache.manifest.sampling.storage})
    return manifest.model_copy(update={"teacher": cache.manifest.teacher, "sampling": sampling})


def extended(location: Folder | Path | str, prompts, *, progress=None, **changes) -> CacheWriter:
    folder = open_folder(location) if isinstance(location, str | Path) else location
    manifest = read_manifest(folder)
    asked = some_manifest(prompts, **{"seed": manifest.sampling.seed, **changes})
    sampling = asked.sampling.model_copy(update={"storage": manifest.sampling.storage})
    asked = asked.model_copy(update={"teacher": manifest.teacher, "sampling": sampling})
    return extend(folder, asked, prompts, TOKENIZER, progress or Silent())


def commit_all(writer: CacheWriter) -> bool:
    for kind in ("embeddings", "trajectories"):
        for shard in writer.missing(kind):
            writer.commit(kind, shard, keyed_arrays(writer, shard, kind), seconds=1.0, provenance={"device": "made-up"})
    return writer.finish()


def tree(path: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(path)): p.read_bytes() if p.is_file() else None for p in path.rglob("*")}


def times(path: Path) -> dict[str, int]:
    return {str(p.relative_to(path)): p.stat().st_mtime_ns for p in path.rglob("*") if p.is_file()}


def rows(cache: Cache) -> dict[str, tuple]:
    found = {}
    for index in cache.indices():
        t = cache.trajectory(int(index))
        arrays = (t.noise_SC, t.velocity_KSC, t.final_latent_SC, cache.embedding(t.prompt))
        found[t.key] = (t.guidance, *(array.tobytes() for array in arrays))
    return found


@BOTH
@pytest.mark.parametrize("latents", ["derived", "stored"])
def test_extended_it_holds_by_key_what_a_build_of_everything_at_once_holds(tmp_path, form, latents):
    prompts = some_prompts(10)
    write_keyed_cache(tmp_path / "c", prompts[:6], format=form, latents=latents)
    before, touched = tree(tmp_path / "c"), times(tmp_path / "c")
    assert commit_all(extended(tmp_path / "c", prompts, replicas=3))
    write_keyed_cache(tmp_path / "whole", prompts, replicas=3, format=form, latents=latents)
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
        tmp_path / "c", [prompts[7], prompts[2], prompts[3]], replicas=2, shard_size=64, progress=progress
    )
    assert writer.manifest.prompts.generations[1:] == (
        Generation(first_prompt=2, prompts=2, first_replica=1, replicas=1, shard_size=4),
        Generation(first_prompt=6, prompts=1, first_replica=0, replicas=2, shard_size=4),
    )
    assert progress.heard == [
        "extended by 4 trajectories and 1 prompts, to 10 trajectories of 7 prompts",
        "shards keep the size of the first ones, 4 rows (--shard-size is 64)",
    ]
    progress = Listening()
    extended(tmp_path / "c", prompts[:4], progress=progress)
    assert progress.heard == ["nothing to add: all of it is among the 10 trajectories of 7 prompts"]
    assert commit_all(extended(tmp_path / "c", prompts[:4])) and verify(tmp_path / "c", Silent()).problems == ()


def test_a_prompt_that_comes_again_from_elsewhere_keeps_its_line_and_that_is_said(tmp_path):
    prompts = some_prompts(7)
    write_keyed_cache(tmp_path / "c", prompts[:6])
    before = (tmp_path / "c/prompts.jsonl").read_bytes()
    progress = Listening()
    again = [replace(prompts[4], sources=("other",)), prompts[6]]
    writer = extended(tmp_path / "c", again, progress=progress)
    assert progress.heard[1] == (
        "1 prompts were there already from other sources, which stay as they are recorded, the first: "
        "'prompt number 4' from made-up"
    )
    assert (tmp_path / "c/prompts.jsonl").read_bytes().startswith(before)
    assert writer.manifest.prompts.sources == {"made-up": 7} and writer.prompts[4].sources == ("made-up",)


def test_another_sampling_and_a_folder_without_a_cache_are_refused(tmp_path):
    prompts = some_prompts(8)
    write_keyed_cache(tmp_path / "c", prompts[:6])
    before = tree(tmp_path / "c")
    with pytest.raises(
        SettingsDiffer, match=r"c was built with sampling.seed = 0, you asked for 5: .* another folder$"
    ):
        extended(tmp_path / "c", prompts, seed=5)
    manifest = read_manifest(LocalFolder(tmp_path / "c"))
    asked = wanted(Cache.open(tmp_path / "c"), prompts)
    with pytest.raises(SettingsDiffer, match=r"prompts.count = 6, .* 8: .*; `understudy build --extend` adds prompts"):
        CacheWriter.create_or_resume(tmp_path / "c", asked, prompts, TOKENIZER)
    assert tree(tmp_path / "c") == before
    with pytest.raises(NotACache, match=rf"{tmp_path}/none has no manifest.json: .*, or leave out --extend to begin"):
        extend(LocalFolder(tmp_path / "none"), manifest, prompts, TOKENIZER, Silent())


@BOTH
def test_killed_at_any_step_it_is_the_old_cache_or_one_that_whoever_comes_finishes(tmp_path, form):
    prompts = some_prompts(9)
    old = write_keyed_cache(tmp_path / "old", prompts[:6], format=form)
    shutil.copytree(tmp_path / "old", tmp_path / "new")
    counting = MortalLocal(tmp_path / "new")
    extended(counting, prompts, replicas=2)
    steps = Mortal.left - counting.left
    assert steps == 3 * STAGED[form] + 4
    ended, begun = tree(tmp_path / "new"), tree(tmp_path / "old")
    states = []
    for step in range(steps):
        path = tmp_path / f"{step}"
        shutil.copytree(tmp_path / "old", path)
        folder = MortalLocal(path)
        folder.left = step
        with pytest.raises(Killed):
            extended(folder, prompts, replicas=2)
        staged = (path / "next/manifest.json").exists()
        states.append((staged, opens(path)))
        says = [problem.message for problem in verify(path, Silent()).problems]
        assert says == ([str(journal.pending(open_folder(path)))] if staged else [])
        # By the same command, by the first build's, and by a repair.
        shutil.copytree(path, tmp_path / "a")
        extended(tmp_path / "a", prompts, replicas=2)
        assert tree(tmp_path / "a") == ended
        shutil.copytree(path, tmp_path / "b")
        is_new = staged or (path / "manifest.json").read_bytes() == ended["manifest.json"]
        if is_new:
            with pytest.raises(SettingsDiffer, match=r"prompts\.count = 9, you asked for 6"):
                CacheWriter.create_or_resume(tmp_path / "b", old.manifest, prompts[:6], TOKENIZER)
        else:
            CacheWriter.create_or_resume(tmp_path / "b", old.manifest, prompts[:6], TOKENIZER)
        assert tree(tmp_path / "b") == (ended if is_new else begun)
        mended = mend(path, None, Silent())
        assert mended.left == () and ("manifest.json" in mended.files) == (staged and is_between(states[-1]))
        assert {n: d for n, d in tree(path).items() if not n.startswith("next")} == (ended if is_new else begun)
        shutil.rmtree(tmp_path / "a"), shutil.rmtree(tmp_path / "b")
    assert [opened for staged, opened in states if not staged][-1] == "new"
    assert {"old", "between", "new"} == {opened for _, opened in states}


def is_between(state: tuple[bool, str]) -> bool:
    return state[1] != "new"


def opens(path: Path) -> str:
    try:
        cache = Cache.open(path)
    except ExtensionPending as error:
        says = f"{path} is being extended, or an extension of it was interrupted: nothing is lost; give the build "
        assert str(error).startswith(f"{says}command with --extend again (or `understudy repair {path}`)")
        return "between"
    assert len(cache) == 6 and len(list(cache.prompts)) == cache.manifest.prompts.count
    return "old" if cache.planned == 6 else "new"


def test_on_a_store_too_it_is_finished_by_whoever_comes(s3, tmp_path):
    prompts = some_prompts(9)
    local = write_keyed_cache(tmp_path / "c", prompts[:6], format="webdataset")
    extended(local.folder, prompts)
    ended = {name: local.folder.read(name) for name in local.folder.names() if not name.startswith("commits/")}
    # Half staged; the index gone; the prompts in place; half swept.
    for step in (1, 4, 5, 8):
        url = f"{s3.url}/{step}"
        write_keyed_cache(url, prompts[:6], format="webdataset")
        folder = MortalObjects(url)
        folder.left = step
        with pytest.raises(Killed):
            extended(folder, prompts)
        extended(url, prompts)
        remote = open_folder(url)
        found = {name: remote.read(name) for name in remote.names() if not name.startswith("commits/")}
        assert found == ended and not any("index" in name for name in remote.names("commits")), step


def test_of_two_who_extend_a_store_at_once_the_second_is_told_who_writes(s3, monkeypatch):
    monkeypatch.setattr(journal, "PATIENCE_SECONDS", 0.0)
    prompts = some_prompts(9)
    write_keyed_cache(s3.url, prompts[:6], format="webdataset")
    before = open_folder(s3.url).read("manifest.json")
    with (
        open_folder(s3.url).claimed("manifest.json"),
        pytest.raises(ShardTaken, match=r"manifest.json is being written"),
    ):
        extended(s3.url, prompts)
    assert open_folder(s3.url).read("manifest.json") == before
    assert commit_all(extended(s3.url, prompts)) and len(Cache.open(s3.url)) == 9


def test_an_extension_that_comes_between_is_built_upon(tmp_path, monkeypatch):
    prompts = some_prompts(10)
    write_keyed_cache(tmp_path / "c", prompts[:6])
    from storage_schemas import extension

    claim = extension.claimed_manifest

    def meanwhile(folder):
        monkeypatch.setattr(extension, "claimed_manifest", claim)
        extended(tmp_path / "c", prompts[6:8])
        return claim(folder)

    monkeypatch.setattr(extension, "claimed_manifest", meanwhile)
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


@BOTH
def test_whoever_reads_during_an_extension_goes_on_reading(tmp_path, form):
    prompts = some_prompts(9)
    write_keyed_cache(tmp_path / "c", prompts[:6], format=form)
    expected = rows(Cache.open(tmp_path / "c"))
    reader = Cache.open(tmp_path / "c")
    commit_all(extended(tmp_path / "c", prompts, replicas=2))
    assert rows(reader) == expected and [p.id for p in reader.prompts] == [p.id for p in prompts[:6]]


def test_opening_while_the_files_change_opens_what_has_come(tmp_path, monkeypatch):
    prompts = some_prompts(9)
    write_keyed_cache(tmp_path / "c", prompts[:6])
    from storage_schemas import reader

    read = reader.read_records

    def meanwhile(folder):
        monkeypatch.setattr(reader, "read_records", read)
        extended(tmp_path / "c", prompts)
        return read(folder)

    monkeypatch.setattr(reader, "read_records", meanwhile)
    assert Cache.open(tmp_path / "c").planned == 9


def interrupted(path: Path, prompts, step: int) -> None:
    folder = MortalLocal(path)
    folder.left = step
    with pytest.raises(Killed):
        extended(folder, prompts)


@BOTH
def test_staged_files_that_were_damaged_are_refused_and_the_old_cache_can_be_had_back(tmp_path, form):
    prompts = some_prompts(9)
    write_keyed_cache(tmp_path / "c", prompts[:6], format=form)
    before = tree(tmp_path / "c")
    # Staged, the index removed, the prompts in place.
    interrupted(tmp_path / "c", prompts, STAGED[form] + 3)
    data = (tmp_path / "c/next/prompts.offsets").read_bytes()
    (tmp_path / "c/next/prompts.offsets").write_bytes(data[:-1])
    found = f"has checksum {xxh3_128(data[:-1])} ({len(data) - 1} bytes), next/manifest.json says {xxh3_128(data)}"
    for attempt in (lambda: extended(tmp_path / "c", prompts), lambda: mend(tmp_path / "c", None, Silent())):
        with pytest.raises(DamagedCache) as info:
            attempt()
        assert found in str(info.value) and f"delete {tmp_path}/c/next, give `understudy repair" in str(info.value)
    shutil.rmtree(tmp_path / "c/next")
    assert mend(tmp_path / "c", None, Silent()).left == () and tree(tmp_path / "c") == before


def test_what_was_staged_for_a_cache_that_has_since_been_extended_otherwise_is_swept(tmp_path):
    prompts = some_prompts(9)
    write_keyed_cache(tmp_path / "c", prompts[:6])
    shutil.copytree(tmp_path / "c", tmp_path / "other")
    interrupted(tmp_path / "other", prompts[6:8], STAGED["zarr"] + 1)
    extended(tmp_path / "c", prompts[8:])
    shutil.copytree(tmp_path / "other/next", tmp_path / "c/next")
    writer = extended(tmp_path / "c", prompts[8:])
    assert [p.id for p in writer.prompts] == [p.id for p in (*prompts[:6], prompts[8])]
    assert not (tmp_path / "c/next").exists()


@BOTH
def test_an_extended_cache_is_converted_cut_down_and_merged_like_any_other(tmp_path, form):
    prompts = some_prompts(9)
    write_keyed_cache(tmp_path / "c", prompts[:6], format=form)
    commit_all(extended(tmp_path / "c", prompts[2:], replicas=2))
    commit_all(extended(tmp_path / "c", prompts[:2], replicas=3))
    cache = Cache.open(tmp_path / "c")
    expected = rows(cache)
    assert len(expected) == 20 and len(cache.manifest.prompts.generations) == 4
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


@pytest.mark.parametrize("name", ["zarr-compact", "webdataset-int8"])
def test_a_version_1_cache_extended_gives_its_records_as_before(tmp_path, name):
    shutil.copytree(Path(__file__).parent / "version_1" / name, tmp_path / "c")
    old = Cache.open(tmp_path / "c")
    expected, prompts = rows(old), list(old.prompts)
    asked = old.manifest.prompts.generations[0].model_copy(update={"replicas": 2})
    manifest = old.manifest.model_copy(
        update={"prompts": old.manifest.prompts.model_copy(update={"generations": (asked,)})}
    )
    extend(LocalFolder(tmp_path / "c"), manifest, prompts, old.tokenizer_files, Silent())
    now = Cache.open(tmp_path / "c")
    assert now.planned > len(now) == len(expected) and rows(now) == expected
    assert same_bits(now.embedding(0), old.embedding(0)) and verify(tmp_path / "c", Silent()).problems == ()


def test_a_trajectory_shard_knows_the_embedding_shards_it_needs():
    generations = (
        Generation(first_prompt=0, prompts=7, first_replica=0, replicas=3, shard_size=4),
        Generation(first_prompt=5, prompts=6, first_replica=3, replicas=2, shard_size=4),
        Generation(first_prompt=10, prompts=2, first_replica=5, replicas=6, shard_size=4),
    )
    layout = Layout(generations)
    for shard in layout.trajectories:
        items = range(shard.first, shard.first + shard.rows)
        assert layout.embedding_shards_of(shard) == {layout.embedding_place(layout.place(i).prompt)[0] for i in items}

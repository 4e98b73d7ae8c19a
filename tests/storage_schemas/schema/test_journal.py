"""Files are replaced together or not at all, whatever interrupts; whoever comes next finishes it."""

import shutil
from pathlib import Path

import pytest

from secondcast.storage_schemas.errors import (
    DamagedCacheError,
    ExtensionPendingError,
    SettingsMismatchError,
    ShardLockedError,
)
from secondcast.storage_schemas.io.digests import xxh3_128
from secondcast.storage_schemas.io.folders import LocalFolder, open_folder
from secondcast.storage_schemas.io.object_folder import ObjectFolder
from secondcast.storage_schemas.maintenance.repair import repair_cache
from secondcast.storage_schemas.maintenance.verify import verify
from secondcast.storage_schemas.progress import Silent
from secondcast.storage_schemas.reader import Cache
from secondcast.storage_schemas.schema import journal
from secondcast.storage_schemas.writer import CacheWriter
from tests.storage_schemas.caches import some_prompts, write_keyed_cache
from tests.storage_schemas.maintenance.extending import TOKENIZER, commit_all, extended, tree

BOTH = pytest.mark.parametrize("form", ["zarr", "webdataset"])
STAGED = {"zarr": 9, "webdataset": 2}


class KilledError(Exception):
    pass


class Mortal:
    """Lets so many writes through, then none."""

    left = 10**6

    def _live(self):
        self.left -= 1
        if self.left < 0:
            raise KilledError

    def replace(self, path, data):
        self._live()
        super().replace(path, data)

    def publish(self, path, data):
        if not path.startswith("locks/"):
            self._live()
        return super().publish(path, data)

    def remove(self, path):
        if not path.startswith("locks/"):
            self._live()
        super().remove(path)


class MortalLocal(Mortal, LocalFolder):
    pass


class MortalObjects(Mortal, ObjectFolder):
    pass


@pytest.mark.slow
@BOTH
def test_killed_at_any_step_it_is_the_old_cache_or_one_that_whoever_comes_finishes(tmp_path, form):
    prompts = some_prompts(9)
    old = write_keyed_cache(tmp_path / "old", prompts[:6], format=form)
    shutil.copytree(tmp_path / "old", tmp_path / "new")
    counting = MortalLocal(tmp_path / "new")
    extended(counting, prompts, samples_per_prompt=2)
    steps = Mortal.left - counting.left
    assert steps == 3 * STAGED[form] + 4
    ended, begun = tree(tmp_path / "new"), tree(tmp_path / "old")
    states = []
    for step in range(steps):
        path = tmp_path / f"{step}"
        shutil.copytree(tmp_path / "old", path)
        folder = MortalLocal(path)
        folder.left = step
        with pytest.raises(KilledError):
            extended(folder, prompts, samples_per_prompt=2)
        staged = (path / "next/manifest.json").exists()
        states.append((staged, opens(path)))
        says = [problem.message for problem in verify(path, Silent()).problems]
        assert says == ([str(journal.pending(open_folder(path)))] if staged else [])
        # By the same command, by the first build's, and by a repair.
        shutil.copytree(path, tmp_path / "a")
        extended(tmp_path / "a", prompts, samples_per_prompt=2)
        assert tree(tmp_path / "a") == ended
        shutil.copytree(path, tmp_path / "b")
        is_new = staged or (path / "manifest.json").read_bytes() == ended["manifest.json"]
        if is_new:
            with pytest.raises(SettingsMismatchError, match=r"prompts\.count = 9, requested 6"):
                CacheWriter.create_or_resume(tmp_path / "b", old.manifest, prompts[:6], TOKENIZER)
        else:
            CacheWriter.create_or_resume(tmp_path / "b", old.manifest, prompts[:6], TOKENIZER)
        assert tree(tmp_path / "b") == (ended if is_new else begun)
        repaired = repair_cache(path, None, Silent())
        assert repaired.left == () and ("manifest.json" in repaired.files) == (staged and is_between(states[-1]))
        assert {n: d for n, d in tree(path).items() if not n.startswith("next")} == (ended if is_new else begun)
        shutil.rmtree(tmp_path / "a"), shutil.rmtree(tmp_path / "b")
    assert [opened for staged, opened in states if not staged][-1] == "new"
    assert {"old", "between", "new"} == {opened for _, opened in states}


def is_between(state: tuple[bool, str]) -> bool:
    return state[1] != "new"


def opens(path: Path) -> str:
    try:
        cache = Cache.open(path)
    except ExtensionPendingError as error:
        says = f"{path} is being extended, or an extension of it was interrupted: nothing is lost; rerun the build "
        assert str(error).startswith(f"{says}command with --extend (or `secondcast repair {path}`)")
        return "between"
    assert len(cache) == 6 and len(list(cache.prompts)) == cache.manifest.prompts.count
    return "old" if cache.planned == 6 else "new"


@pytest.mark.slow
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
        with pytest.raises(KilledError):
            extended(folder, prompts)
        extended(url, prompts)
        remote = open_folder(url)
        found = {name: remote.read(name) for name in remote.names() if not name.startswith("commits/")}
        assert found == ended and not any("index" in name for name in remote.names("commits")), step


@pytest.mark.thorough
def test_of_two_who_extend_a_store_at_once_the_second_is_told_who_writes(s3, monkeypatch):
    monkeypatch.setattr(journal, "PATIENCE_SECONDS", 0.0)
    prompts = some_prompts(9)
    write_keyed_cache(s3.url, prompts[:6], format="webdataset")
    before = open_folder(s3.url).read("manifest.json")
    with (
        open_folder(s3.url).lock("manifest.json"),
        pytest.raises(ShardLockedError, match=r"manifest.json is being written"),
    ):
        extended(s3.url, prompts)
    assert open_folder(s3.url).read("manifest.json") == before
    assert commit_all(extended(s3.url, prompts)) and len(Cache.open(s3.url)) == 9


def interrupted(path: Path, prompts, step: int) -> None:
    folder = MortalLocal(path)
    folder.left = step
    with pytest.raises(KilledError):
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
    found = f"has checksum {xxh3_128(data[:-1])} ({len(data) - 1} bytes), next/manifest.json has {xxh3_128(data)}"
    for attempt in (lambda: extended(tmp_path / "c", prompts), lambda: repair_cache(tmp_path / "c", None, Silent())):
        with pytest.raises(DamagedCacheError) as info:
            attempt()
        assert found in str(info.value) and f"delete {tmp_path}/c/next, run `secondcast repair" in str(info.value)
    shutil.rmtree(tmp_path / "c/next")
    assert repair_cache(tmp_path / "c", None, Silent()).left == () and tree(tmp_path / "c") == before


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

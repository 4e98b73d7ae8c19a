"""A local copy of shard files: fetched once, bounded, never other bytes than the record's, never a user's file."""

import os
from pathlib import Path

import pytest

from secondcast.storage_schemas.errors import DamagedCacheError, SettingsError
from secondcast.storage_schemas.formats.files import CommittedFiles
from secondcast.storage_schemas.formats.local_cache import OWN_FOLDER, LocalCache
from secondcast.storage_schemas.io.digests import xxh3_128
from secondcast.storage_schemas.io.folders import LocalFolder
from secondcast.storage_schemas.reader import Cache
from secondcast.storage_schemas.schema.commits import FileRecord
from secondcast.storage_schemas.schema.fields import same_bits
from tests.commands.limits import no_file_above
from tests.storage_schemas.caches import write_cache


class Counted(LocalFolder):
    """A folder that counts what is read from it."""

    def __init__(self, path):
        super().__init__(path)
        self.reads = []

    def read(self, path, begin=0, end=None):
        self.reads.append(path)
        return super().read(path, begin, end)


@pytest.fixture(params=["zarr", "webdataset"])
def elsewhere(request, tmp_path):
    write_cache(tmp_path / "c", count=12, format=request.param)
    return Counted(tmp_path / "c")


def files_of(elsewhere, place, limit_bytes=2**30, verify="once", say=pytest.fail):
    copy = LocalCache.open(place, limit_bytes=limit_bytes, say=say)
    return CommittedFiles(elsewhere, Cache.open(elsewhere.path).records, verify=verify, local_cache=copy)


def shard_files(elsewhere):
    return [file.path for record in Cache.open(elsewhere.path).records.values() for file in record.files]


def kept(place):
    return sorted((place / OWN_FOLDER).iterdir())


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("verify", ["off", "once", "always"])
def test_a_file_is_fetched_once_and_read_here_from_then_on(elsewhere, tmp_path, verify):
    files = files_of(elsewhere, tmp_path / "near", verify=verify)
    for path in shard_files(elsewhere):
        whole = (elsewhere.path / path).read_bytes()
        assert files.read(path, 3, 40) == whole[3:40] and files.read(path, 0, None) == whole
        assert files.read(path, -7, None) == whole[-7:]
    # Files of equal bytes, such as the byte indices of equal tars, are fetched once for all.
    assert len(elsewhere.reads) == len({(elsewhere.path / path).read_bytes() for path in shard_files(elsewhere)})
    elsewhere.reads.clear()
    again = files_of(elsewhere, tmp_path / "near", verify=verify)
    assert all(again.read(path, 0, 8) for path in shard_files(elsewhere)) and not elsewhere.reads


def test_a_cache_gives_the_same_records_through_a_copy(elsewhere, tmp_path):
    copy = LocalCache.open(tmp_path / "near", limit_bytes=10_000, say=pytest.fail)
    near = Cache.open(elsewhere.path, local_cache=copy)
    for index in range(12):
        assert same_bits(near.trajectory(index).velocity_KSC, Cache.open(elsewhere.path).trajectory(index).velocity_KSC)
    assert kept(tmp_path / "near")


def test_the_longest_unused_files_make_room(elsewhere, tmp_path):
    paths = shard_files(elsewhere)
    sizes = {path: (elsewhere.path / path).stat().st_size for path in paths}
    limit = max(sizes.values()) + sorted(sizes.values())[-2]
    files = files_of(elsewhere, tmp_path / "near", limit)
    for path in [*paths, *paths]:
        assert len(files.read(path, 0, None)) == sizes[path]
        assert sum(file.stat().st_size for file in kept(tmp_path / "near")) <= limit


def test_making_room_deletes_no_file_of_the_user(elsewhere, tmp_path):
    place = tmp_path / "near"
    (place / OWN_FOLDER / ("0" * 32)).mkdir(parents=True)
    (tmp_path / "linked.bin").write_bytes(b"linked")
    (place / OWN_FOLDER / ("1" * 32)).symlink_to(tmp_path / "linked.bin")
    foreign = {
        place / "mine.bin": os.urandom(3_000_000), place / ("a" * 32): b"named like a copy",
        place / OWN_FOLDER / "notes.txt": b"notes", place / OWN_FOLDER / ".mine.1-a.tmp": b"hidden",
        tmp_path / "linked.bin": b"linked",
    }  # fmt: skip
    for file, data in foreign.items():
        file.write_bytes(data)
        os.utime(file, (1, 1))
    largest = max((elsewhere.path / path).stat().st_size for path in shard_files(elsewhere))
    files = files_of(elsewhere, place, largest)
    for path in shard_files(elsewhere) * 2:
        files.read(path, 0, None)
    assert {file: file.read_bytes() for file in foreign} == foreign
    assert (place / OWN_FOLDER / ("0" * 32)).is_dir() and (place / OWN_FOLDER / ("1" * 32)).is_symlink()


def test_a_file_larger_than_the_limit_is_read_where_it_is(elsewhere, tmp_path):
    files = files_of(elsewhere, tmp_path / "near", 1)
    path = shard_files(elsewhere)[0]
    assert files.read(path, 0, None) == (elsewhere.path / path).read_bytes() and not kept(tmp_path / "near")


def test_damaged_bytes_are_not_kept(elsewhere, tmp_path):
    files = files_of(elsewhere, tmp_path / "near")
    path = shard_files(elsewhere)[0]
    flip(elsewhere.path / path)
    with pytest.raises(DamagedCacheError, match=f"{path} has checksum"):
        files.read(path, 0, 4)
    assert not kept(tmp_path / "near")


@pytest.mark.parametrize("verify", ["once", "always"])
@pytest.mark.parametrize("damage", [flip, lambda path: path.write_bytes(path.read_bytes()[:9])])
def test_a_damaged_copy_is_fetched_again_and_no_damage_of_the_cache(elsewhere, tmp_path, verify, damage):
    path = shard_files(elsewhere)[0]
    whole = (elsewhere.path / path).read_bytes()
    assert files_of(elsewhere, tmp_path / "near", verify=verify).read(path, 0, None) == whole
    (copy,) = kept(tmp_path / "near")
    damage(copy)
    assert files_of(elsewhere, tmp_path / "near", verify=verify).read(path, 1, 60) == whole[1:60]
    assert copy.read_bytes() == whole


def test_a_copy_that_was_cut_while_it_is_used_is_fetched_again(elsewhere, tmp_path):
    path = shard_files(elsewhere)[0]
    whole = (elsewhere.path / path).read_bytes()
    files = files_of(elsewhere, tmp_path / "near")
    files.read(path, 0, None)
    kept(tmp_path / "near")[0].write_bytes(whole[:9])
    assert files.read(path, 0, 40) == whole[:40] and kept(tmp_path / "near")[0].read_bytes() == whole


def test_a_copy_that_cannot_be_read_turns_the_copies_off_with_one_line(elsewhere, tmp_path):
    paths, heard = shard_files(elsewhere), []
    files_of(elsewhere, tmp_path / "near").read(paths[0], 0, None)
    (copy,) = kept(tmp_path / "near")
    copy.unlink()
    copy.mkdir()
    files = files_of(elsewhere, tmp_path / "near", say=heard.append)
    for path in paths:
        assert files.read(path, 0, None) == (elsewhere.path / path).read_bytes()
    assert heard == [
        f"no further copy is read in --local-cache-dir {tmp_path / 'near'} (Is a directory): shard files are read from "
        "the cache itself"
    ]


def test_a_full_disk_turns_further_copies_off_with_one_line(elsewhere, tmp_path):
    paths, heard = sorted(shard_files(elsewhere), key=lambda path: (elsewhere.path / path).stat().st_size), []
    files = files_of(elsewhere, tmp_path / "near", say=heard.append)
    assert files.read(paths[0], 0, None)
    with no_file_above((elsewhere.path / paths[0]).stat().st_size):
        for path in [*paths, *paths]:
            assert files.read(path, 0, None) == (elsewhere.path / path).read_bytes()
    assert heard == [
        f"no further copies are kept in --local-cache-dir {tmp_path / 'near'} (File too large): shard files are read "
        "from the cache itself"
    ]
    elsewhere.reads.clear()
    assert files.read(paths[0], 0, None) and not elsewhere.reads


def test_a_place_that_can_hold_no_copies_is_one_line(tmp_path):
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(
        SettingsError, match=rf"^--local-cache-dir {tmp_path}/file cannot be used \(Not a directory\): exp"
    ):
        LocalCache.open(tmp_path / "file", limit_bytes=1, say=pytest.fail)
    assert (tmp_path / "file").read_bytes() == b"mine"


def test_a_checksum_that_is_a_path_reaches_no_other_file(tmp_path):
    (tmp_path / "mine.bin").write_bytes(b"mine")
    copy = LocalCache.open(tmp_path / "near", limit_bytes=2**20, say=pytest.fail)
    file = FileRecord(path="embeddings/000000.tar", bytes=4, xxh3_128="../../mine.bin")
    assert copy.whole(file, lambda: b"else") == b"else"
    file = file.model_copy(update={"xxh3_128": xxh3_128(b"else")})
    assert copy.whole(file, lambda: b"else") == b"else"
    assert (tmp_path / "mine.bin").read_bytes() == b"mine" and len(kept(tmp_path / "near")) == 1

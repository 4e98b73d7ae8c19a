"""A local copy of shard files: fetched once, bounded, never other bytes than the record's."""

import pytest

from secondcast.storage_schemas.errors import DamagedCache
from secondcast.storage_schemas.formats.files import CommittedFiles
from secondcast.storage_schemas.formats.local_copy import LocalCopy
from secondcast.storage_schemas.io.folders import LocalFolder
from secondcast.storage_schemas.reader import Cache
from secondcast.storage_schemas.schema.fields import same_bits
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


def copy_of(elsewhere, folder, limit_bytes=2**30):
    return LocalCopy(elsewhere, Cache.open(elsewhere.path).records, folder, limit_bytes=limit_bytes)


def shard_files(elsewhere):
    return [file.path for record in Cache.open(elsewhere.path).records.values() for file in record.files]


def test_a_file_is_fetched_once_and_read_here_from_then_on(elsewhere, tmp_path):
    copy = copy_of(elsewhere, tmp_path / "near")
    for path in shard_files(elsewhere):
        whole = (elsewhere.path / path).read_bytes()
        assert copy.read(path, 3, 40) == whole[3:40] and copy.read(path) == whole and copy.size(path) == len(whole)
    # Files of equal bytes, such as the byte indices of equal tars, are fetched once for all.
    assert len(elsewhere.reads) == len({(elsewhere.path / path).read_bytes() for path in shard_files(elsewhere)})
    elsewhere.reads.clear()
    again = copy_of(elsewhere, tmp_path / "near")
    assert all(again.read(path, 0, 8) for path in shard_files(elsewhere)) and not elsewhere.reads


def test_a_cache_gives_the_same_records_through_a_copy(elsewhere, tmp_path):
    near = Cache.open(elsewhere.path, local_copy=tmp_path / "near", local_copy_bytes=10_000)
    for index in range(12):
        assert same_bits(near.trajectory(index).velocity_KSC, Cache.open(elsewhere.path).trajectory(index).velocity_KSC)
    assert any((tmp_path / "near").iterdir())


def test_the_longest_unused_files_make_room(elsewhere, tmp_path):
    paths = shard_files(elsewhere)
    sizes = {path: (elsewhere.path / path).stat().st_size for path in paths}
    limit = max(sizes.values()) + sorted(sizes.values())[-2]
    copy = copy_of(elsewhere, tmp_path / "near", limit)
    for path in [*paths, *paths]:
        assert len(copy.read(path)) == sizes[path]
        assert sum(file.stat().st_size for file in (tmp_path / "near").iterdir()) <= limit


def test_a_file_larger_than_the_limit_is_read_where_it_lies(elsewhere, tmp_path):
    copy = copy_of(elsewhere, tmp_path / "near", 1)
    path = shard_files(elsewhere)[0]
    assert copy.read(path) == (elsewhere.path / path).read_bytes() and not (tmp_path / "near").exists()


def test_damaged_bytes_are_not_kept(elsewhere, tmp_path):
    opened = Cache.open(elsewhere.path)
    path = shard_files(elsewhere)[0]
    data = bytearray((elsewhere.path / path).read_bytes())
    data[5] ^= 1
    (elsewhere.path / path).write_bytes(data)
    copy = LocalCopy(elsewhere, opened.records, tmp_path / "near", limit_bytes=2**30)
    files = CommittedFiles(copy, opened.records, verify="once")
    with pytest.raises(DamagedCache, match=f"{path} has checksum"):
        files.read(path, 0, 4)
    assert not (tmp_path / "near").exists()

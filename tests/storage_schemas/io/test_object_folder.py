"""A cache on an object store, through a real S3 API on a socket: the same records, the same bytes, the same errors."""

import sys
import time

import numpy as np
import pytest

from secondcast.storage_schemas.errors import (
    DamagedCacheError,
    MissingExtraError,
    NotACacheError,
    SettingsMismatchError,
    StorageError,
)
from secondcast.storage_schemas.io import object_folder
from secondcast.storage_schemas.io.folders import open_folder
from secondcast.storage_schemas.io.object_folder import ObjectFolder
from secondcast.storage_schemas.reader import Cache
from secondcast.storage_schemas.schema.fields import same_bits
from tests.storage_schemas.caches import begin, commit, write_cache
from tests.storage_schemas.io.s3_server import Fault, every_so_often

SHARDS = {"zarr": "trajectories.zarr/velocity/c/0/0/0/0", "webdataset": "trajectories/000000.tar"}
BOTH = pytest.mark.parametrize("form", ["zarr", "webdataset"])


def assert_same_records(a, b):
    assert len(a) == len(b) == a.planned
    for i in range(a.planned):
        one, other = a.trajectory(i), b.trajectory(i)
        assert (one.key, one.guidance) == (other.key, other.guidance)
        assert same_bits(one.velocity_KSC, other.velocity_KSC) and same_bits(one.noise_SC, other.noise_SC)
        assert same_bits(a.embedding(one.prompt), b.embedding(one.prompt))


@pytest.mark.thorough
@BOTH
def test_a_cache_on_a_store_has_the_files_and_records_of_a_local_one(s3, tmp_path, form):
    write_cache(tmp_path / "c", format=form)
    write_cache(f"{s3.url}/some/where", format=form)
    local, remote = open_folder(tmp_path / "c"), open_folder(f"{s3.url}/some/where")
    assert remote.names() == local.names() and remote.entries() == local.entries()
    for name in remote.names():
        if not name.startswith("commits/"):
            assert remote.read(name) == local.read(name), name
    cache = Cache.open(f"{s3.url}/some/where")
    assert cache.finished and cache.location == f"{s3.url}/some/where"
    assert_same_records(cache, Cache.open(tmp_path / "c"))


@pytest.mark.slow
@BOTH
def test_a_build_on_a_store_goes_on_where_it_stopped(s3, tmp_path, form):
    writer = begin(s3.url, format=form)
    commit(writer, writer.missing("trajectories")[1])
    kept = writer.folder.read("commits/trajectories-000001.json")
    assert not Cache.open(s3.url).finished and len(Cache.open(s3.url)) == 2
    write_cache(s3.url, format=form)
    write_cache(tmp_path / "c", format=form)
    assert writer.folder.read("commits/trajectories-000001.json") == kept
    assert_same_records(Cache.open(s3.url), Cache.open(tmp_path / "c"))


@pytest.mark.thorough
@BOTH
def test_everything_arrives_through_a_net_that_fails(s3, tmp_path, form):
    s3.proxy.rule = every_so_often(refuse=13, cut=5, seed=3)
    write_cache(s3.url, count=3, format=form)
    write_cache(tmp_path / "c", count=3, format=form)
    assert_same_records(Cache.open(s3.url), Cache.open(tmp_path / "c"))
    assert s3.proxy.faults > 10
    s3.proxy.rule = lambda number, method, path: None
    remote, local = open_folder(s3.url), open_folder(tmp_path / "c")
    assert remote.names() == local.names()
    assert all(remote.read(name) == local.read(name) for name in local.names() if not name.startswith("commits/"))


def test_other_settings_are_refused_and_nothing_is_written(s3):
    begin(s3.url)
    before = {name: open_folder(s3.url).read(name) for name in open_folder(s3.url).names()}
    with pytest.raises(SettingsMismatchError, match=r"s3://\S+ was built with sampling.seed = 0, requested 3"):
        begin(s3.url, seed=3)
    assert {name: open_folder(s3.url).read(name) for name in open_folder(s3.url).names()} == before


def test_a_prefix_with_other_objects_is_left_alone(s3):
    s3.ask("PUT", "a/thesis/1.txt", b"years of work")
    with pytest.raises(NotACacheError, match=r"has 'thesis' and 0 more, but no manifest.json"):
        begin(f"{s3.url}/a")
    assert open_folder(s3.url).names() == ["a/thesis/1.txt"]


def test_opening_takes_a_request_per_file_and_a_record_two_per_file(s3):
    write_cache(s3.url)
    s3.reset()
    cache = Cache.open(s3.url)
    # Manifest, index, two sizes, seven files of metadata.
    assert len(s3.proxy.requests) == 11
    s3.reset()
    cache.trajectory(1)
    # The prompts whole for their checksum, their offsets, one of them; four files whole likewise, a chunk of each.
    assert len(s3.proxy.requests) == 11


@pytest.mark.slow
def test_large_objects_go_and_come_in_parts(s3, monkeypatch):
    data = np.random.default_rng(0).bytes(3 * 6 * 2**20 + 17)
    monkeypatch.setattr(object_folder, "PART_BYTES", 6 * 2**20)
    folder = ObjectFolder(s3.url)
    s3.proxy.rule = every_so_often(refuse=5, cut=3, seed=1)
    folder.replace("big", data)
    assert sum(method == "PUT" for method, _ in s3.proxy.requests) >= 4
    assert folder.read("big") == data == s3.ask("GET", "big")
    assert folder.read("big", 5, len(data) - 3) == data[5:-3] and folder.read("big", 7) == data[7:]
    assert folder.read("big", len(data) - 2, len(data) + 9) == data[-2:]
    assert folder.read("big", len(data) + 2, len(data) + 9) == b"" == folder.read("big", 9, 9)


# Damage.


@pytest.mark.thorough
@BOTH
def test_missing_short_and_flipped_objects_are_errors(s3, form):
    write_cache(s3.url, format=form)
    data = s3.ask("GET", SHARDS[form])
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 4
    for wrong, message in (
        (data[:-1], f"has {len(data) - 1} bytes, expected {len(data)}"),
        (b"", f"has 0 bytes, expected {len(data)}"),
        (bytes(flipped), "has checksum"),
    ):
        s3.ask("PUT", SHARDS[form], wrong)
        with pytest.raises(DamagedCacheError, match=f"{message}.*trajectories shard 0 is damaged"):
            Cache.open(s3.url).trajectory(0)
    s3.ask("DELETE", SHARDS[form])
    with pytest.raises(DamagedCacheError, match=rf"{s3.url}/{SHARDS[form]} is missing: .*`secondcast repair {s3.url} "):
        Cache.open(s3.url).trajectory(0)
    assert Cache.open(s3.url).trajectory(4).prompt == 4


# Stores that do not answer.


def assert_one_line(info, *parts):
    text = str(info.value)
    assert all(part in text for part in parts), text
    assert "\n" not in text and "Debug source" not in text and len(text) < 500


def test_a_store_that_cannot_be_reached_is_one_line_within_seconds(monkeypatch, s3):
    monkeypatch.setenv("AWS_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr(object_folder, "FIRST_PATIENCE_SECONDS", 0.5)
    begun = time.monotonic()
    with pytest.raises(StorageError) as info:
        Cache.open(s3.url)
    assert time.monotonic() - begun < 6
    found = f"{s3.url}/manifest.json cannot be read (Generic S3 error: Error performing GET http://127.0.0.1:1/"
    assert_one_line(info, found, "error sending request): check the address, the credentials (AWS_ACCESS_KEY_ID, ")


def test_a_bucket_that_is_not_there_is_one_line(s3):
    for attempt in (lambda: Cache.open("s3://nobodys-bucket/a"), lambda: begin("s3://nobodys-bucket/a")):
        with pytest.raises(StorageError) as info:
            attempt()
        assert_one_line(info, "s3://nobodys-bucket/a", "(NoSuchBucket: The specified bucket does not exist): check")


def test_wrong_credentials_are_one_line_at_once(s3):
    said = b"<Error><Code>InvalidAccessKeyId</Code><Message>The key does not exist.</Message></Error>"
    s3.proxy.rule = lambda number, method, path: Fault(status=403, body=said)
    with pytest.raises(StorageError) as info:
        Cache.open(f"{s3.url}/a")
    assert_one_line(info, f"{s3.url}/a/manifest.json cannot be read (InvalidAccessKeyId: The key does not exist): ")
    assert len(s3.proxy.requests) == 1


def test_a_store_that_goes_away_in_mid_build_is_waited_for_then_named(s3, monkeypatch):
    monkeypatch.setattr(object_folder, "PATIENCE_SECONDS", 0.2)
    writer = begin(s3.url)
    shard = writer.missing("trajectories")[0]
    s3.proxy.rule = lambda number, method, path: Fault(status=503)
    with pytest.raises(StorageError) as info:
        commit(writer, shard)
    assert_one_line(info, "SlowDown: Please reduce your request rate")
    s3.proxy.rule = lambda number, method, path: None
    commit(writer, writer.missing("trajectories")[0])


def test_an_empty_prefix_is_no_cache_and_a_wrong_address_is_no_store(s3):
    with pytest.raises(NotACacheError, match=rf"{s3.url}/a has no manifest.json: it is not a cache"):
        Cache.open(f"{s3.url}/a")
    with pytest.raises(StorageError) as info:
        ObjectFolder("s3://")
    assert_one_line(info, "cannot be opened (Generic URL error: Unable to recognise URL")


def test_without_obstore_the_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(MissingExtraError, match=r"s3://b/c is on an object store .*pip install 'secondcast\[s3\]'"):
        Cache.open("s3://b/c")

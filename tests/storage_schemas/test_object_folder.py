"""A cache on an object store, through a real S3 API on a socket: the same records, the same bytes, the same errors."""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from storage_schemas import claims, object_folder
from storage_schemas.commits import is_published, record_path
from storage_schemas.errors import DamagedCache, MissingExtra, NotACache, SettingsDiffer, ShardTaken, StoreFails
from storage_schemas.fields import same_bits
from storage_schemas.folders import open_folder
from storage_schemas.object_folder import ObjectFolder
from storage_schemas.reader import Cache
from storage_schemas.writer import CacheWriter
from tests.storage_schemas.caches import some_arrays, some_manifest, some_prompts, write_cache
from tests.storage_schemas.s3_server import Fault, every_so_often

SHARDS = {"zarr": "trajectories.zarr/velocity/c/0/0/0/0", "webdataset": "trajectories/000000.tar"}
BOTH = pytest.mark.parametrize("form", ["zarr", "webdataset"])


def begin(location, **changes):
    prompts = some_prompts(6)
    return CacheWriter.create_or_resume(location, some_manifest(prompts, **changes), prompts, {})


def commit(writer, shard, **changes):
    arrays = some_arrays(writer.manifest, shard) | changes
    return writer.commit("trajectories", shard, arrays, seconds=0, provenance={})


def assert_same_records(a, b):
    assert len(a) == len(b) == a.planned
    for i in range(a.planned):
        one, other = a.trajectory(i), b.trajectory(i)
        assert (one.key, one.guidance) == (other.key, other.guidance)
        assert same_bits(one.velocity_KSC, other.velocity_KSC) and same_bits(one.noise_SC, other.noise_SC)
        assert same_bits(a.embedding(one.prompt), b.embedding(one.prompt))


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
    with pytest.raises(SettingsDiffer, match=r"s3://\S+ was built with sampling.seed = 0, you asked for 3"):
        begin(s3.url, seed=3)
    assert {name: open_folder(s3.url).read(name) for name in open_folder(s3.url).names()} == before


def test_a_prefix_with_other_objects_is_left_alone(s3):
    s3.ask("PUT", "a/thesis/1.txt", b"years of work")
    with pytest.raises(NotACache, match=r"holds 'thesis' and 0 more, but no manifest.json"):
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
    # The prompt and its place; each of four files whole for its checksum, then one chunk.
    assert len(s3.proxy.requests) == 10


# Two builders.


def test_who_comes_after_the_record_is_told_and_damages_nothing(s3):
    writer, other = begin(s3.url), begin(s3.url)
    shard = writer.missing("trajectories")[1]
    commit(writer, shard)
    guidance = some_arrays(writer.manifest, shard)["guidance"]
    with pytest.raises(ShardTaken, match="trajectories shard 1 was committed by another builder"):
        commit(other, shard, guidance=guidance + 1)
    assert Cache.open(s3.url).trajectory(5).guidance == float(guidance[1])


def test_who_comes_while_another_writes_is_told_and_damages_nothing(s3):
    writer, other = begin(s3.url), begin(s3.url)
    shard = writer.missing("trajectories")[1]
    guidance = some_arrays(writer.manifest, shard)["guidance"]
    real, told = writer.folder.replace, []

    def meanwhile(path, data):
        real(path, data)
        with pytest.raises(ShardTaken, match=f"trajectories-000001.json is being .* .process {os.getpid()} on") as info:
            commit(other, shard, guidance=guidance + 1)
        told.append(info)

    writer.folder.replace = meanwhile
    commit(writer, shard)
    assert len(told) == 4 and Cache.open(s3.url).trajectory(5).guidance == float(guidance[1])


def test_of_many_builders_that_begin_at_once_one_commits(s3):
    writers = [begin(s3.url) for _ in range(4)]
    shard = writers[0].missing("trajectories")[0]
    guidance = some_arrays(writers[0].manifest, shard)["guidance"]

    def race(number):
        try:
            commit(writers[number], shard, guidance=guidance + number)
        except ShardTaken:
            return None
        return number

    with ThreadPoolExecutor(4) as pool:
        winners = [number for number in pool.map(race, range(4)) if number is not None]
    assert len(winners) == 1
    assert Cache.open(s3.url).trajectory(0).guidance == float(guidance[0]) + winners[0]
    assert b"<Key>claims/" not in s3.ask("GET", "?list-type=2&prefix=claims/")


def test_the_loser_of_a_race_for_the_manifest_writes_over_nothing(s3):
    folder, late = open_folder(s3.url), []
    real = ObjectFolder.replace

    def meanwhile(self, path, data):
        real(self, path, data)
        if not late:
            late.append(path)
            with pytest.raises(ShardTaken, match=r"manifest.json is being written by another builder"):
                prompts = some_prompts(9)
                CacheWriter.create_or_resume(s3.url, some_manifest(prompts), prompts, {})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ObjectFolder, "replace", meanwhile)
        begin(s3.url)
    assert late and folder.size("prompts.jsonl") == Cache.open(s3.url).manifest.prompts.bytes
    assert len(list(Cache.open(s3.url).prompts)) == 6


# Claims.

PATH = "claims/commits-trajectories-000001.json"


def leave_claim(s3, **changes):
    process = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    claim = claims._this_machine() | {"process": int(process.stdout)} | changes
    s3.ask("PUT", PATH, json.dumps(claim).encode())


def test_the_claim_of_a_dead_process_on_this_machine_is_taken_over_at_once(s3):
    writer = begin(s3.url)
    leave_claim(s3)
    record = commit(writer, writer.missing("trajectories")[1])
    assert is_published(writer.folder, record) and PATH not in s3.ask("GET", "?list-type=2").decode()


@pytest.mark.parametrize("other", [{"host": "elsewhere"}, {"boot": "another container's"}, {"process": os.getpid()}])
def test_a_claim_that_may_be_alive_is_taken_over_when_it_is_old_by_the_clock_of_the_store(s3, monkeypatch, other):
    writer = begin(s3.url)
    leave_claim(s3, **other)
    shard = writer.missing("trajectories")[1]
    with pytest.raises(ShardTaken, match=r"or wait 900 seconds if that one is dead"):
        commit(writer, shard)
    later = datetime.now(UTC) + timedelta(seconds=claims.CLAIM_SECONDS + 5)
    monkeypatch.setattr(claims._Claim, "_store_time", lambda self: later)
    commit(writer, shard)
    assert len(Cache.open(s3.url)) == 2


def test_a_claim_that_cannot_be_read_is_in_force_until_it_is_old(s3):
    s3.ask("PUT", PATH, b"{half")
    with pytest.raises(ShardTaken, match="trajectories-000001.json is being written by another builder: nothing"):
        commit(begin(s3.url), begin(s3.url).missing("trajectories")[1])


def test_of_two_that_take_over_the_same_claim_one_wins(s3):
    folder = ObjectFolder(s3.url)
    s3.ask("PUT", "claims/x", b"dead")
    _, version, _ = folder.read_version("claims/x")
    assert folder.exchange("claims/x", b"mine", version)
    assert not folder.exchange("claims/x", b"yours", version)
    assert folder.read("claims/x") == b"mine"


def test_a_slow_builder_renews_its_claim_and_one_that_lost_it_is_told_before_it_writes(s3, monkeypatch):
    writer = begin(s3.url)
    first, second = writer.missing("trajectories")
    clock = [1e6]
    monkeypatch.setattr(claims, "_now", lambda: clock[0])
    real, versions = writer.folder.replace, []

    def slowly(path, data):
        clock[0] += claims.CLAIM_SECONDS / 2
        real(path, data)
        versions.append(s3.ask("GET", PATH.replace("000001", "000000")))

    writer.folder.replace = slowly
    commit(writer, first)
    assert len(set(versions)) == len(versions) == 4

    def robbed(path, data):
        slowly_written.append(path)
        clock[0] += claims.CLAIM_SECONDS * 2
        s3.ask("PUT", PATH, b"another's")

    slowly_written = []
    writer.folder.replace = robbed
    with pytest.raises(ShardTaken, match="by another builder that took over since this one was too slow"):
        commit(writer, second)
    assert len(slowly_written) == 1 and s3.ask("GET", PATH) == b"another's"


def test_a_store_that_knows_no_conditions_is_refused_before_anything_is_written(s3):
    s3.proxy.rule = lambda number, method, path: Fault(forget_conditions=True)
    with pytest.raises(StoreFails, match=f"{s3.url} cannot be built on: the store takes a PUT with If-None-Match: "):
        begin(s3.url)
    assert b"<Key>" not in s3.ask("GET", "?list-type=2")


# Answers that do not come.


@pytest.mark.parametrize("fault", [Fault(lose_answer=True), Fault(status=409)])
def test_a_record_whose_first_answer_was_lost_counts_as_ours(s3, fault):
    writer = begin(s3.url)
    shard = writer.missing("trajectories")[0]
    name, hit = record_path("trajectories", 0), []

    def once(number, method, path):
        if method == "PUT" and path.endswith(f"/{name}") and not hit:
            hit.append(number)
            return fault
        return None

    s3.proxy.rule = once
    record = commit(writer, shard)
    assert hit and writer.folder.read(name) == record.encode()


def test_a_claim_whose_answers_are_lost_is_still_held_by_one_alone(s3):
    folder, lost = ObjectFolder(s3.url), []

    def rule(number, method, path):
        if method == "PUT" and "/claims/" in path and len(lost) < 2:
            lost.append(number)
            return Fault(lose_answer=True)
        return None

    s3.proxy.rule = rule
    with folder.claimed("commits/a"), pytest.raises(ShardTaken), folder.claimed("commits/a"):
        raise AssertionError("both hold it")
    assert lost


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
        with pytest.raises(DamagedCache, match=f"{message}.*trajectories shard 0 is damaged"):
            Cache.open(s3.url).trajectory(0)
    s3.ask("DELETE", SHARDS[form])
    with pytest.raises(DamagedCache, match=rf"{s3.url}/{SHARDS[form]} is missing: .*`understudy repair {s3.url} "):
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
    with pytest.raises(StoreFails) as info:
        Cache.open(s3.url)
    assert time.monotonic() - begun < 6
    found = f"{s3.url}/manifest.json cannot be read (Generic S3 error: Error performing GET http://127.0.0.1:1/"
    assert_one_line(info, found, "error sending request): check the address, the credentials (AWS_ACCESS_KEY_ID, ")


def test_a_bucket_that_is_not_there_is_one_line(s3):
    for attempt in (lambda: Cache.open("s3://nobodys-bucket/a"), lambda: begin("s3://nobodys-bucket/a")):
        with pytest.raises(StoreFails) as info:
            attempt()
        assert_one_line(info, "s3://nobodys-bucket/a", "(NoSuchBucket: The specified bucket does not exist): check")


def test_wrong_credentials_are_one_line_at_once(s3):
    said = b"<Error><Code>InvalidAccessKeyId</Code><Message>The key does not exist.</Message></Error>"
    s3.proxy.rule = lambda number, method, path: Fault(status=403, body=said)
    with pytest.raises(StoreFails) as info:
        Cache.open(f"{s3.url}/a")
    assert_one_line(info, f"{s3.url}/a/manifest.json cannot be read (InvalidAccessKeyId: The key does not exist): ")
    assert len(s3.proxy.requests) == 1


def test_a_store_that_goes_away_in_mid_build_is_waited_for_then_named(s3, monkeypatch):
    monkeypatch.setattr(object_folder, "PATIENCE_SECONDS", 0.2)
    writer = begin(s3.url)
    s3.proxy.rule = lambda number, method, path: Fault(status=503)
    with pytest.raises(StoreFails) as info:
        commit(writer, writer.missing("trajectories")[0])
    assert_one_line(info, "SlowDown: Please reduce your request rate")
    s3.proxy.rule = lambda number, method, path: None
    commit(writer, writer.missing("trajectories")[0])


def test_an_empty_prefix_is_no_cache_and_a_wrong_address_is_no_store(s3):
    with pytest.raises(NotACache, match=rf"{s3.url}/a has no manifest.json: it is not a cache"):
        Cache.open(f"{s3.url}/a")
    with pytest.raises(StoreFails) as info:
        ObjectFolder("s3://")
    assert_one_line(info, "cannot be opened (Generic URL error: Unable to recognise URL")


def test_without_obstore_the_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(MissingExtra, match=r"s3://b/c is on an object store .*pip install 'understudy\[s3\]'"):
        Cache.open("s3://b/c")

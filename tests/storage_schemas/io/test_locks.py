"""Two builders on an object store: one wins, the other is told, nothing is damaged, whatever the net loses."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest

from secondcast.storage_schemas.errors import ShardLockedError, StorageError
from secondcast.storage_schemas.io import locks
from secondcast.storage_schemas.io.durable import this_machine
from secondcast.storage_schemas.io.folders import open_folder
from secondcast.storage_schemas.io.object_folder import ObjectFolder
from secondcast.storage_schemas.reader import Cache
from secondcast.storage_schemas.schema import journal
from secondcast.storage_schemas.schema.commits import is_published, record_path
from secondcast.storage_schemas.writer import CacheWriter
from tests.storage_schemas.caches import begin, commit, some_arrays, some_manifest, some_prompts
from tests.storage_schemas.io.s3_server import Fault

# Two builders.


def test_who_comes_after_the_record_is_told_and_damages_nothing(s3):
    writer, other = begin(s3.url), begin(s3.url)
    shard = writer.missing("trajectories")[1]
    commit(writer, shard)
    guidance = some_arrays(writer.manifest, shard)["guidance"]
    with pytest.raises(ShardLockedError, match="another builder committed trajectories shard 1 in the meantime"):
        commit(other, shard, guidance=guidance + 1)
    assert Cache.open(s3.url).trajectory(5).guidance == float(guidance[1])


@pytest.mark.thorough
def test_who_comes_while_another_writes_is_told_and_damages_nothing(s3):
    writer, other = begin(s3.url), begin(s3.url)
    shard = writer.missing("trajectories")[1]
    guidance = some_arrays(writer.manifest, shard)["guidance"]
    real, told = writer.folder.replace, []

    def meanwhile(path, data):
        real(path, data)
        with pytest.raises(
            ShardLockedError, match=f"trajectories-000001.json is being .* .process {os.getpid()} on"
        ) as info:
            commit(other, shard, guidance=guidance + 1)
        told.append(info)

    writer.folder.replace = meanwhile
    commit(writer, shard)
    assert len(told) == 4 and Cache.open(s3.url).trajectory(5).guidance == float(guidance[1])


@pytest.mark.thorough
def test_of_many_builders_that_begin_at_once_one_commits(s3):
    writers = [begin(s3.url) for _ in range(4)]
    shard = writers[0].missing("trajectories")[0]
    guidance = some_arrays(writers[0].manifest, shard)["guidance"]

    def race(number):
        try:
            commit(writers[number], shard, guidance=guidance + number)
        except ShardLockedError:
            return None
        return number

    with ThreadPoolExecutor(4) as pool:
        winners = [number for number in pool.map(race, range(4)) if number is not None]
    assert len(winners) == 1
    assert Cache.open(s3.url).trajectory(0).guidance == float(guidance[0]) + winners[0]
    assert b"<Key>locks/" not in s3.ask("GET", "?list-type=2&prefix=locks/")


@pytest.mark.thorough
def test_the_loser_of_a_race_for_the_manifest_writes_over_nothing(s3):
    folder, late = open_folder(s3.url), []
    real = ObjectFolder.replace

    def meanwhile(self, path, data):
        real(self, path, data)
        if not late:
            late.append(path)
            with pytest.raises(ShardLockedError, match=r"manifest.json is being written by another builder"):
                prompts = some_prompts(9)
                CacheWriter.create_or_resume(s3.url, some_manifest(prompts), prompts, {})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ObjectFolder, "replace", meanwhile)
        patch.setattr(journal, "PATIENCE_SECONDS", 0.5)
        begin(s3.url)
    assert late and folder.size("prompts.jsonl") == Cache.open(s3.url).manifest.prompts.bytes
    assert len(list(Cache.open(s3.url).prompts)) == 6


# Locks.

PATH = "locks/commits-trajectories-000001.json"


def leave_lock(s3, **changes):
    process = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    lock = this_machine() | {"process": int(process.stdout)} | changes
    s3.ask("PUT", PATH, json.dumps(lock).encode())


def test_the_claim_of_a_dead_process_on_this_machine_is_taken_over_at_once(s3):
    writer = begin(s3.url)
    leave_lock(s3)
    record = commit(writer, writer.missing("trajectories")[1])
    assert is_published(writer.folder, record) and PATH not in s3.ask("GET", "?list-type=2").decode()


@pytest.mark.parametrize("other", [{"host": "elsewhere"}, {"boot": "another container's"}, {"process": os.getpid()}])
def test_a_claim_that_may_be_alive_is_taken_over_when_it_is_old_by_the_clock_of_the_store(s3, monkeypatch, other):
    writer = begin(s3.url)
    leave_lock(s3, **other)
    shard = writer.missing("trajectories")[1]
    with pytest.raises(ShardLockedError, match=r"or wait 900 seconds if that one is dead"):
        commit(writer, shard)
    later = datetime.now(UTC) + timedelta(seconds=locks.LOCK_SECONDS + 5)
    monkeypatch.setattr(locks._Lock, "_store_time", lambda self: later)
    commit(writer, shard)
    assert len(Cache.open(s3.url)) == 2


def test_a_claim_that_cannot_be_read_is_in_force_until_it_is_old(s3):
    s3.ask("PUT", PATH, b"{half")
    with pytest.raises(ShardLockedError, match="trajectories-000001.json is being written by another builder: nothing"):
        commit(begin(s3.url), begin(s3.url).missing("trajectories")[1])


def test_of_two_that_take_over_the_same_claim_one_wins(s3):
    folder = ObjectFolder(s3.url)
    s3.ask("PUT", "locks/x", b"dead")
    _, version, _ = folder.read_version("locks/x")
    assert folder.exchange("locks/x", b"mine", version)
    assert not folder.exchange("locks/x", b"yours", version)
    assert folder.read("locks/x") == b"mine"


def test_a_slow_builder_renews_its_claim_and_one_that_lost_it_is_told_before_it_writes(s3, monkeypatch):
    writer = begin(s3.url)
    first, second = writer.missing("trajectories")
    clock = [1e6]
    monkeypatch.setattr(locks, "_now", lambda: clock[0])
    real, versions = writer.folder.replace, []

    def slowly(path, data):
        clock[0] += locks.LOCK_SECONDS / 2
        real(path, data)
        versions.append(s3.ask("GET", PATH.replace("000001", "000000")))

    writer.folder.replace = slowly
    commit(writer, first)
    assert len(set(versions)) == len(versions) == 4

    def robbed(path, data):
        slowly_written.append(path)
        clock[0] += locks.LOCK_SECONDS * 2
        s3.ask("PUT", PATH, b"another's")

    slowly_written = []
    writer.folder.replace = robbed
    with pytest.raises(ShardLockedError, match="by another builder that took over because this one was too slow"):
        commit(writer, second)
    assert len(slowly_written) == 1 and s3.ask("GET", PATH) == b"another's"


def test_a_store_that_knows_no_conditions_is_refused_before_anything_is_written(s3):
    s3.proxy.rule = lambda number, method, path: Fault(forget_conditions=True)
    with pytest.raises(
        StorageError, match=f"{s3.url} cannot be built on: the store accepts a PUT with If-None-Match: "
    ):
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
        if method == "PUT" and "/locks/" in path and len(lost) < 2:
            lost.append(number)
            return Fault(lose_answer=True)
        return None

    s3.proxy.rule = rule
    with folder.lock("commits/a"), pytest.raises(ShardLockedError), folder.lock("commits/a"):
        raise AssertionError("both hold it")
    assert lost

"""A builder may be killed, meet another one, a full disk or a read-only folder: what was committed stays, whole."""

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from secondcast.storage_schemas import writer
from secondcast.storage_schemas.io import durable
from secondcast.storage_schemas.maintenance.verify import verify
from secondcast.storage_schemas.progress import Silent
from secondcast.storage_schemas.reader import Cache
from secondcast.storage_schemas.writer import CacheWriter
from tests.storage_schemas.caches import data_files, some_arrays, some_manifest, some_prompts, write_cache
from tests.stress.kill_loop import Rounds, Tally, write_slowly

BOTH = pytest.mark.parametrize("form", ["zarr", "webdataset"])


@pytest.mark.slow
@BOTH
def test_killed_anywhere_nothing_committed_is_lost_or_torn_and_the_end_is_the_same(tmp_path, form):
    tally = Rounds(write_slowly, form, tmp_path, 7, Tally(builder=form), 0.004).run(3, pairs=0.5)
    assert tally.faults == [] and tally.kills >= 3 and tally.finished >= 1


@BOTH
@pytest.mark.parametrize(
    ("code", "says", "count"),
    [
        (errno.ENOSPC, "No space left", 1),
        (errno.ENOSPC, "No space left", 2),
        (errno.ENOSPC, "No space left", 4),
        (errno.EROFS, "Read-only file system", 1),
    ],
)
def test_a_full_disk_or_a_read_only_folder_loses_nothing_and_names_the_file(
    tmp_path, form, code, says, count, monkeypatch
):
    write_cache(tmp_path / "whole", format=form)
    prompts = some_prompts(6)
    building = CacheWriter.create_or_resume(tmp_path / "c", some_manifest(prompts, format=form), prompts, {})
    commit_all(building, "embeddings")
    before = data_files(tmp_path / "c")
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fails_from_the(count, code))
        with pytest.raises(OSError, match=says) as raised:
            commit_all(building, "trajectories")
    assert raised.value.filename.startswith(str(tmp_path / "c/trajectories")) and ".tmp" not in raised.value.filename
    assert not list((tmp_path / "c").rglob(".*.tmp"))
    assert before.items() <= data_files(tmp_path / "c").items()
    assert len(Cache.open(tmp_path / "c")) == 0 and verify(tmp_path / "c", Silent()).problems == ()
    commit_all(building, "trajectories")
    assert building.finish() and data_files(tmp_path / "c") == data_files(tmp_path / "whole")


def commit_all(building, kind):
    for shard in building.missing(kind):
        building.commit(kind, shard, some_arrays(building.manifest, shard, kind), seconds=0, provenance={})


def fails_from_the(count, code):
    calls = 0

    def fsync(descriptor):
        nonlocal calls
        calls += 1
        if calls >= count:
            raise OSError(code, os.strerror(code))

    return fsync


def test_a_folder_that_cannot_be_made_is_named(tmp_path, monkeypatch):
    def refuses(path, **how):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(Path, "mkdir", refuses)
    with pytest.raises(OSError, match=rf"Read-only file system: '{tmp_path}/new'"):
        durable.replace(tmp_path / "new/file", b"x")


def test_what_a_builder_killed_before_the_manifest_left_is_swept_away(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / "c/tokenizer").mkdir(parents=True)
    leftovers = [f".prompts.jsonl.{dead.pid}-ab.tmp", f"tokenizer/.spiece.model.{dead.pid}-ab.tmp"]
    for name in leftovers:
        (tmp_path / "c" / name).write_bytes(b"half")
    write_cache(tmp_path / "c")
    write_cache(tmp_path / "whole")
    assert data_files(tmp_path / "c") == data_files(tmp_path / "whole")


def test_of_two_builders_that_begin_at_once_the_later_joins_the_other(tmp_path, monkeypatch):
    check_free = writer._check_free

    def meanwhile(folder):
        with monkeypatch.context() as patched:
            patched.setattr(writer, "_check_free", check_free)
            write_cache(tmp_path / "c")
        check_free(folder)

    monkeypatch.setattr(writer, "_check_free", meanwhile)
    prompts = some_prompts(6)
    second = CacheWriter.create_or_resume(tmp_path / "c", some_manifest(prompts), prompts, {})
    assert not second.missing("trajectories") and verify(tmp_path / "c", Silent()).problems == ()


def test_a_temporary_file_of_another_machine_goes_when_it_is_a_day_old(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    new, old = (tmp_path / f".file.0badcafe-{dead.pid}-{end}.tmp" for end in ("aa", "bb"))
    for path in (new, old):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - durable.LEFTOVER_SECONDS - 60,) * 2)
    assert durable.remove_leftovers(tmp_path) == 1
    assert new.exists() and not old.exists()


def test_a_temporary_file_says_machine_and_process_of_its_writer(tmp_path):
    code = (
        "import sys, pathlib; from secondcast.storage_schemas.io import durable;"
        "print(durable._write_temporary(pathlib.Path(sys.argv[1]) / 'file', b'half'))"
    )
    made = Path(subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True).stdout.strip())
    ours = durable._write_temporary(tmp_path / "file", b"half")
    assert made.exists() and durable.remove_leftovers(tmp_path) == 1
    assert ours.exists() and not made.exists()

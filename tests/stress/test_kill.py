"""A builder may be killed, meet another one, a full disk or a read-only folder: what was committed stays, whole."""

import errno
import fcntl
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from secondcast.storage_schemas import writer
from secondcast.storage_schemas.errors import StorageError
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
    end = f"{durable._machine_token()}-{dead.pid}-0badcafe.tmp"
    leftovers = [f".prompts.jsonl.{end}", f"tokenizer/.spiece.model.{end}"]
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
    new, old = (tmp_path / f".file.0badcafe-{dead.pid}-{end}.tmp" for end in ("aaaaaaaa", "bbbbbbbb"))
    for path in (new, old):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - durable.LEFTOVER_SECONDS - 60,) * 2)
    assert durable.remove_leftovers(tmp_path) == 1
    assert new.exists() and not old.exists()


def test_only_temporary_files_of_this_program_are_swept(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    foreign = [f".notes.{dead.pid}-a.tmp", ".mine.tmp", ".2024-05.tmp", f".x.0badcafe-{2**40}-aaaaaaa.tmp"]
    for name in foreign:
        (tmp_path / name).write_bytes(b"mine")
        os.utime(tmp_path / name, (1, 1))
    (tmp_path / f".folder.{durable._machine_token()}-{dead.pid}-0badcafe.tmp").mkdir()
    assert durable.remove_leftovers(tmp_path) == 0
    assert all((tmp_path / name).read_bytes() == b"mine" for name in foreign)


def test_a_temporary_file_says_machine_and_process_of_its_writer(tmp_path):
    code = (
        "import sys, pathlib; from secondcast.storage_schemas.io import durable;"
        "print(durable._write_temporary(pathlib.Path(sys.argv[1]) / 'file', b'half'))"
    )
    made = Path(subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True).stdout.strip())
    ours = durable._write_temporary(tmp_path / "file", b"half")
    assert made.exists() and durable.remove_leftovers(tmp_path) == 1
    assert ours.exists() and not made.exists()


def test_without_hard_links_a_file_is_created_once_and_never_replaced(tmp_path, monkeypatch):
    def refuses(*_):
        # As exFAT has it.
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuses)
    assert durable.publish(tmp_path / "record.json", b"first") and not durable.publish(tmp_path / "record.json", b"2")
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"first"]
    write_cache(tmp_path / "c")
    assert verify(tmp_path / "c", Silent()).problems == ()


def test_a_file_system_without_locks_is_one_line(tmp_path, monkeypatch):
    def refuses(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuses)
    with pytest.raises(
        StorageError, match=rf"^{tmp_path}/c is on a file system without locks \(flock: No locks av"
    ) as got:
        write_cache(tmp_path / "c")
    assert "\n" not in str(got.value)


def test_a_file_system_that_syncs_no_folders_is_written(tmp_path, monkeypatch):
    real = os.fsync

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    durable.replace(tmp_path / "file", b"data")
    assert (tmp_path / "file").read_bytes() == b"data"


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_the_usual_mode_is_that_of_the_umask(tmp_path, umask):
    code = f"import os, pathlib, sys; from secondcast.storage_schemas.io import durable; os.umask({umask}); "
    code += "print(durable.usual_mode(pathlib.Path(sys.argv[1])))"
    said = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True).stdout
    assert int(said) == 0o666 & ~umask and not list(tmp_path.iterdir())

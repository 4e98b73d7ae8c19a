"""`repair` with the teacher gives back the recorded bytes, or says what differs; and so through the command line."""

import errno
import os
import shutil
import sys

import pytest
import torch

from secondcast import cli
from secondcast.cache_builder.repair.rebuild import rebuild
from secondcast.models.backbone import Backbone
from secondcast.models.teacher.folder import BUILD_PARTS, find_teacher
from secondcast.storage_schemas.errors import DamagedCacheError, SettingsMismatchError
from secondcast.storage_schemas.maintenance.repair import repair_cache
from secondcast.storage_schemas.maintenance.verify import verify
from secondcast.storage_schemas.progress import Silent, counted
from secondcast.storage_schemas.reader import Cache
from tests.cache_builder.building import build_cache, data_files

KINDS = pytest.mark.parametrize(
    ("form", "stored"), [("zarr", True), ("webdataset", True), ("zarr", False), ("webdataset", False)]
)
BOTH = pytest.mark.parametrize("form", ["zarr", "webdataset"])
SHARDS = {
    "zarr": {
        "trajectories": "trajectories.zarr/velocity/c/1/0/0/0",
        "embeddings": "embeddings.zarr/encoder_hidden_states/c/0/0/0",
    },
    "webdataset": {"trajectories": "trajectories/000001.tar", "embeddings": "embeddings/000000.tar"},
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, dev_teacher):
    folder = tmp_path_factory.mktemp("whole")
    (folder / "animals.txt").write_text("".join(f"a red dog {i}\n" for i in range(6)))
    for form in ("zarr", "webdataset"):
        for stored in (True, False):
            flags = {"format": form, "store_embeddings": stored, "dtype": "float32"}
            build_cache(folder / f"{form}-{stored}", dev_teacher, folder / "animals.txt", **flags)
    return folder


@pytest.fixture
def cache(tmp_path, whole, form, request):
    stored = request.node.callspec.params.get("stored", True)
    return shutil.copytree(whole / f"{form}-{stored}", tmp_path / "c")


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


def rebuilt(cache, teacher, **how):
    how = {"batch_size": None, "allow_mismatch": False, **how}
    return rebuild(cache, find_teacher(str(teacher), BUILD_PARTS), torch.device("cpu"), Silent(), **how)


def contents(cache):
    return {str(path.relative_to(cache)): path.read_bytes() for path in cache.rglob("*") if path.is_file()}


@pytest.mark.slow
@KINDS
@pytest.mark.parametrize("damage", ["flipped", "short", "lost"])
def test_a_damaged_shard_comes_back_with_the_same_bytes(cache, dev_teacher, form, stored, damage):
    before = contents(cache)
    for path in SHARDS[form].values() if stored else [SHARDS[form]["trajectories"]]:
        if damage == "lost":
            (cache / path).unlink()
        elif damage == "short":
            (cache / path).write_bytes(before[path][:7])
        else:
            flip(cache / path)
    bad = [("embeddings", 0), ("trajectories", 1)][not stored :]
    assert rebuilt(cache, dev_teacher) == bad
    # The records vouch for the same files, so that not even a time changes.
    assert contents(cache) == before and verify(cache, Silent()).problems == ()


@pytest.mark.thorough
@KINDS
def test_a_lost_record_comes_back_from_the_index_or_by_the_build_command(
    cache, dev_teacher, whole, form, stored, monkeypatch, capsys
):
    before = contents(cache)
    (cache / "commits/trajectories-000001.json").unlink()
    assert repair_cache(cache, None, Silent()).left == () and contents(cache) == before

    # Without the index too, this is a cache that is not finished: what has no record does not exist.
    lost = ["trajectories-000001", *(["embeddings-000001"] if stored else [])]
    for name in (*lost, "index"):
        (cache / f"commits/{name}.json").unlink()
    code, lines, _ = secondcast(monkeypatch, capsys, "repair", cache, "--teacher", dev_teacher, "--quiet")
    lacks = counted(len(lost), "shard")
    says = f"{cache}: every file matches its checksum; {lacks} not built yet: run the build command to build the rest"
    assert (code, lines) == (0, [says])
    flags = {"format": form, "store_embeddings": stored, "dtype": "float32"}
    build_cache(cache, dev_teacher, whole / "animals.txt", **flags)
    assert data_files(cache) == {name: data for name, data in before.items() if not name.startswith("commits/")}
    assert verify(cache, Silent()).problems == () and Cache.open(cache).finished


@BOTH
def test_another_teacher_is_refused_by_the_field(cache, schnell_teacher, form):
    flip(cache / SHARDS[form]["trajectories"])
    damaged = contents(cache)
    with pytest.raises(
        SettingsMismatchError, match=r"c was recorded with teacher\.\S+ = .*, this teacher has .*: every recorded"
    ):
        rebuilt(cache, schnell_teacher)
    assert contents(cache) == damaged


@BOTH
def test_other_bytes_are_refused_and_taken_only_where_that_was_accepted(cache, dev_teacher, form, monkeypatch):
    flip(cache / SHARDS[form]["trajectories"])
    damaged = contents(cache)
    predict = Backbone.predict
    monkeypatch.setattr(Backbone, "predict", lambda *inputs, **more: predict(*inputs, **more) * 1.0009765625)
    says = (
        rf"{cache}: rebuilt trajectories shard 1 differs from the recorded bytes \(batch_size 2 -> 3\): nothing "
        rf"was written; rebuild on the machine that made it, restore it from a copy with --from, or "
        rf"record the new bytes with --allow-mismatch"
    )
    with pytest.raises(DamagedCacheError, match=says):
        rebuilt(cache, dev_teacher, batch_size=3)
    assert contents(cache) == damaged
    with pytest.raises(DamagedCacheError, match=r"from the recorded bytes \(the same settings\): nothing was written"):
        rebuilt(cache, dev_teacher)
    assert rebuilt(cache, dev_teacher, batch_size=3, allow_mismatch=True) == [("trajectories", 1)]
    assert verify(cache, Silent()).problems == ()
    opened = Cache.open(cache)
    assert opened.finished and opened.records["trajectories", 1].provenance["batch_size"] == 3
    assert opened.trajectory(3).velocity_KSC.shape == opened.trajectory(0).velocity_KSC.shape


def secondcast(monkeypatch, capsys, *words):
    """Exit code, lines of stdout and lines of stderr of a command."""
    monkeypatch.setattr(sys, "argv", ["secondcast", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    said = capsys.readouterr()
    return end.value.code, said.out.splitlines(), said.err.splitlines()


@BOTH
def test_the_commands_name_each_problem_both_ways_out_and_what_was_done(cache, dev_teacher, form, monkeypatch, capsys):
    before = contents(cache)
    for path in SHARDS[form].values():
        flip(cache / path)
    (cache / "prompts.offsets").unlink()
    code, lines, _ = secondcast(monkeypatch, capsys, "inspect", "verify", cache, "--quiet")
    assert code == 1 and lines[0].endswith(", 3 problems")
    rows = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines[2:5]]
    for path in [*SHARDS[form].values(), "prompts.offsets"]:
        assert any(path in row and row[-1].startswith("has ") for row in rows), path
    assert lines[5:7] == ["to repair:", f"  secondcast repair {cache} --teacher {dev_teacher}"]

    code, lines, errors = secondcast(monkeypatch, capsys, "repair", cache, "--quiet")
    assert code == 1 and lines == ["prompts.offsets: repaired"] and len(errors) == 1
    assert errors[0].startswith(f"secondcast: {cache} has 2 problems left, the first: {cache}/")
    assert "--teacher TEACHER`, or restore it from another copy with" in errors[0] and "--from COPY`" in errors[0]

    words = ("repair", cache, "--teacher", dev_teacher, "--device", "cpu", "--quiet")
    code, lines, errors = secondcast(monkeypatch, capsys, *words)
    assert (code, errors) == (0, [])
    done = ["embeddings shard 0: rebuilt", "trajectories shard 1: rebuilt", f"{cache}: every file matches its checksum"]
    assert lines == done and contents(cache) == before
    code, lines, _ = secondcast(monkeypatch, capsys, "inspect", "verify", cache, "--quiet")
    assert code == 0 and lines[-1].endswith(", 0 problems") and len(lines) == 1


@pytest.mark.thorough
@BOTH
def test_a_full_disk_ends_a_build_with_one_line_and_the_build_goes_on(
    tmp_path, dev_teacher, whole, form, monkeypatch, capsys
):
    flags = ("--dtype", "float32", "--steps", 4, "--shard-size", 3, "--batch-size", 2, "--format", form)
    words = ("build", tmp_path / "c", "--teacher", dev_teacher, "--prompts", whole / "animals.txt", *flags)
    words = (*words, "--device", "cpu", "--quiet")
    fsync, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        # The text stage has its two shards then.
        if len(list((tmp_path / "c").glob("commits/embeddings-*.json"))) == 2 and len(calls) % 5 == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        code, _, errors = secondcast(monkeypatch, capsys, *words)
    assert code == 1 and len(errors) == 1
    assert errors[0].startswith(f"secondcast: {tmp_path}/c/")
    assert errors[0].endswith(
        ": No space left on device: committed work is kept; fix the cause and run the same command again"
    )
    assert verify(tmp_path / "c", Silent()).problems == ()
    assert len(list((tmp_path / "c").glob("commits/embeddings-*.json"))) == 2
    assert secondcast(monkeypatch, capsys, *words)[0] == 0
    assert data_files(tmp_path / "c") == data_files(whole / f"{form}-True")

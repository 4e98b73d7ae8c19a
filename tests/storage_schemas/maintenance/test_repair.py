"""`verify` finds what is wrong, `repair` puts right what it can, from the cache itself and from another copy."""

import json
import shutil

import pytest

from secondcast.storage_schemas.errors import DamagedCacheError, NewerCacheError, NotACacheError, SettingsMismatchError
from secondcast.storage_schemas.maintenance.repair import repair_cache
from secondcast.storage_schemas.maintenance.verify import verify
from secondcast.storage_schemas.progress import Silent
from secondcast.storage_schemas.reader import Cache
from secondcast.storage_schemas.schema.json_files import with_digest
from tests.storage_schemas.caches import some_prompts, write_cache, write_keyed_cache

BOTH = pytest.mark.parametrize("form", ["zarr", "webdataset"])


@pytest.fixture
def cache(tmp_path, form):
    write_cache(tmp_path / "c", format=form)
    shutil.copytree(tmp_path / "c", tmp_path / "copy")
    return tmp_path / "c"


def every_file(cache):
    return sorted(p for p in cache.rglob("*") if p.is_file())


def contents(cache):
    return {p.relative_to(cache): p.read_bytes() for p in every_file(cache)}


@BOTH
def test_a_whole_cache_has_no_problems(cache, form):
    report = verify(cache, Silent())
    assert report.problems == () and report.shards == 4 and report.missing == 0
    assert report.bytes == Cache.open(cache).records.bytes


@pytest.mark.slow
@BOTH
def test_each_file_that_is_lost_cut_or_flipped_is_found_and_copied_back(cache, form):
    whole = contents(cache)
    for number, file in enumerate(every_file(cache)):
        data = file.read_bytes()
        flipped = bytearray(data)
        flipped[len(data) // 2] ^= 16
        # Two of four kinds of damage for each file, in turn: all with all take long.
        for bad in (None, data[:-1], b"", bytes(flipped))[number % 2 :: 2]:
            file.unlink()
            if bad is not None:
                file.write_bytes(bad)
            try:
                assert verify(cache, Silent()).problems, (file, bad)
            except (DamagedCacheError, NotACacheError) as error:
                assert file.name == "manifest.json" and "manifest.json" in str(error)
            assert repair_cache(cache, cache.parent / "copy", Silent()).left == ()
            assert contents(cache) == whole, (file, bad)


@pytest.mark.parametrize("form", ["zarr"])
@pytest.mark.parametrize(
    "name",
    ["commits/index.json", "commits/trajectories-000001.json", "prompts.offsets", "trajectories.zarr/noise/zarr.json"],
)
def test_what_follows_from_the_rest_of_a_cache_is_made_anew_without_a_copy(cache, form, name):
    whole = contents(cache)
    (cache / name).write_bytes(b"{}")
    done = repair_cache(cache, None, Silent())
    assert done.left == () and done.files == (name,) and contents(cache) == whole


@BOTH
def test_without_a_copy_a_bad_shard_is_left_and_named(cache, form):
    path = {"zarr": "trajectories.zarr/noise/c/1/0/0", "webdataset": "trajectories/000001.tar"}[form]
    (cache / path).unlink()
    done = repair_cache(cache, None, Silent())
    assert [problem.shard for problem in done.left] == [("trajectories", 1)]
    assert f"{cache}/{path} is missing" in done.left[0].message


@BOTH
def test_swapped_shards_and_records_are_found(cache, form):
    pairs = {
        "zarr": ("trajectories.zarr/velocity/c/0/0/0/0", "trajectories.zarr/velocity/c/1/0/0/0"),
        "webdataset": ("trajectories/000000.tar", "trajectories/000001.tar"),
    }
    for one, two in (pairs[form], ("commits/trajectories-000000.json", "commits/trajectories-000001.json")):
        a, b = (cache / one).read_bytes(), (cache / two).read_bytes()
        (cache / one).write_bytes(b)
        (cache / two).write_bytes(a)
        found = {problem.path for problem in verify(cache, Silent()).problems}
        assert {one, two} <= found
        repair_cache(cache, cache.parent / "copy", Silent())


@BOTH
def test_a_foreign_file_is_named(cache, form):
    (cache / "trajectories").mkdir(exist_ok=True)
    (cache / "trajectories/000002.tar").write_bytes(b"x")
    (problem,) = verify(cache, Silent()).problems
    assert problem.message == f"{cache}/trajectories/000002.tar is not a file of this cache: delete it"


@BOTH
def test_what_a_download_from_the_hub_adds_is_no_problem(cache, form):
    (cache / ".cache/huggingface/download").mkdir(parents=True)
    for name in (
        ".gitattributes",
        ".cache/huggingface/.gitignore",
        ".cache/huggingface/download/a.metadata",
    ):
        (cache / name).write_text("x")
    assert not verify(cache, Silent()).problems


@BOTH
@pytest.mark.parametrize("foreign", [{"manifest.json": '{"name": "my web app"}'}, {"manifest.json": "x", "a.txt": "a"}])
def test_a_folder_that_is_no_copy_is_not_repaired_into_one(cache, form, foreign, tmp_path):
    (tmp_path / "mine").mkdir()
    for name, text in foreign.items():
        (tmp_path / "mine" / name).write_text(text)
    with pytest.raises(
        NotACacheError, match=rf"^{tmp_path}/mine has '\w+.\w+' and {len(foreign) - 1} more, none of which "
    ):
        repair_cache(tmp_path / "mine", cache, Silent())
    assert {file.name: file.read_text() for file in every_file(tmp_path / "mine")} == foreign


@BOTH
def test_a_lost_cache_is_copied_whole_into_a_new_folder(cache, form, tmp_path):
    assert repair_cache(tmp_path / "new", cache, Silent()).left == () and contents(tmp_path / "new") == contents(cache)


@pytest.mark.parametrize("form", ["zarr"])
def test_a_copy_of_another_cache_is_refused(cache, form, tmp_path):
    write_cache(tmp_path / "other", seed=9)
    (cache / "prompts.offsets").unlink()
    with pytest.raises(
        SettingsMismatchError, match=r"other is not a copy of .*c: it has sampling.seed = 9, this cache has 0"
    ):
        repair_cache(cache, tmp_path / "other", Silent())


@BOTH
def test_a_damaged_copy_gives_nothing_away(cache, form):
    path = {"zarr": "trajectories.zarr/noise/c/1/0/0", "webdataset": "trajectories/000001.tar"}[form]
    for folder in (cache, cache.parent / "copy"):
        data = bytearray((folder / path).read_bytes())
        data[-1] ^= 1
        (folder / path).write_bytes(data)
    done = repair_cache(cache, cache.parent / "copy", Silent())
    assert done.shards == () and [problem.shard for problem in done.left] == [("trajectories", 1)]


@BOTH
@pytest.mark.parametrize("verify_mode", ["off", "once", "always"])
def test_checksums_are_compared_never_once_or_always(cache, form, verify_mode):
    opened = Cache.open(cache, verify=verify_mode)
    opened.trajectory(0)
    path = {"zarr": "trajectories.zarr/guidance/c/0", "webdataset": "trajectories/000000.tar"}[form]
    data = bytearray((cache / path).read_bytes())
    data[-1] ^= 1
    (cache / path).write_bytes(data)
    if verify_mode == "always":
        with pytest.raises(DamagedCacheError, match="has checksum"):
            opened.trajectory(0)
    elif form == "webdataset":
        # The changed byte is in the padding behind the last sample.
        opened.trajectory(0)


@BOTH
def test_shards_whose_records_were_lost_with_the_index_come_back_from_a_copy(cache, form):
    whole = contents(cache)
    (cache / "commits/index.json").unlink()
    (cache / "commits/trajectories-000001.json").unlink()
    assert verify(cache, Silent()).missing == 1
    done = repair_cache(cache, cache.parent / "copy", Silent())
    assert done.shards == (("trajectories", 1),) and done.left == () and done.missing == 0
    assert contents(cache) == whole


def test_a_damaged_tokenizer_of_a_copy_is_not_taken_and_a_whole_one_is(tmp_path):
    for name in ("c", "copy"):
        write_keyed_cache(tmp_path / name, some_prompts(4))
        (tmp_path / name / "tokenizer/spiece.model").write_bytes(f"damaged in {name}".encode())
    done = repair_cache(tmp_path / "c", tmp_path / "copy", Silent())
    assert done.files == () and [problem.path for problem in done.left] == ["tokenizer/spiece.model"]
    assert (tmp_path / "c/tokenizer/spiece.model").read_bytes() == b"damaged in c"
    (tmp_path / "copy/tokenizer/spiece.model").write_bytes(b"pieces")
    done = repair_cache(tmp_path / "c", tmp_path / "copy", Silent())
    assert done.files == ("tokenizer/spiece.model",) and done.left == ()


@BOTH
def test_a_record_of_a_newer_version_is_neither_damage_nor_replaced_by_a_copy(cache, form):
    (cache / "commits/index.json").unlink(missing_ok=True)
    file = sorted((cache / "commits").glob("trajectories-*.json"))[0]
    value = json.loads(file.read_bytes())
    value.pop("digest")
    file.write_bytes(with_digest(value | {"signature": "s"}))
    before = contents(cache)
    for work in (lambda: verify(cache, Silent()), lambda: repair_cache(cache, cache.parent / "copy", Silent())):
        with pytest.raises(NewerCacheError, match=r"is intact, but signature is an unknown key .*: a newer version"):
            work()
    assert contents(cache) == before

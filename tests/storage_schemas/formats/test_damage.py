"""A damaged cache says so, names the shard, and never gives made-up numbers."""

import json

import pytest

from secondcast.storage_schemas.errors import DamagedCacheError, NotACacheError, NotInCacheError, UnreadableFileError
from secondcast.storage_schemas.maintenance.verify import verify
from secondcast.storage_schemas.progress import Silent
from secondcast.storage_schemas.reader import Cache
from secondcast.storage_schemas.schema.commits import CommitRecord
from secondcast.storage_schemas.schema.json_files import with_digest
from tests.commands.limits import outside_of_private_folders, unprivileged
from tests.storage_schemas.caches import write_cache

SHARDS = {"zarr": "trajectories.zarr/velocity/c/0/0/0/0", "webdataset": "trajectories/000000.tar"}
BOTH = pytest.mark.parametrize("form", ["zarr", "webdataset"])


@pytest.fixture
def cache(tmp_path, form):
    write_cache(tmp_path / "c", format=form)
    return tmp_path / "c"


@BOTH
def test_a_missing_shard_is_an_error_not_zeros(cache, form):
    (cache / SHARDS[form]).unlink()
    repair = (
        f"rebuild it with `secondcast repair {cache} --teacher TEACHER`, or restore it from another copy with "
        f"`secondcast repair {cache} --from COPY`"
    )
    with pytest.raises(DamagedCacheError, match=f"is missing: trajectories shard 0 is damaged; {repair}"):
        Cache.open(cache).trajectory(0)
    assert Cache.open(cache).trajectory(4).prompt == 4


@BOTH
@pytest.mark.parametrize("keep", [0, 1, -1])
def test_a_short_shard_is_an_error(cache, form, keep):
    file = cache / SHARDS[form]
    data = file.read_bytes()
    file.write_bytes(data[:keep])
    with pytest.raises(DamagedCacheError, match=f"has {len(data[:keep])} bytes, expected {len(data)}"):
        Cache.open(cache).trajectory(0)


@BOTH
def test_a_flipped_bit_is_an_error(cache, form):
    file = cache / SHARDS[form]
    data = bytearray(file.read_bytes())
    for place in (0, len(data) // 2, len(data) - 1):
        changed = data.copy()
        changed[place] ^= 4
        file.write_bytes(changed)
        with pytest.raises(DamagedCacheError, match="has checksum"):
            Cache.open(cache).trajectory(0)


@BOTH
def test_swapped_shards_are_an_error(cache, form):
    first = cache / SHARDS[form]
    second = cache / SHARDS[form].replace("c/0/0", "c/1/0").replace("000000", "000001")
    a, b = first.read_bytes(), second.read_bytes()
    first.write_bytes(b)
    second.write_bytes(a)
    with pytest.raises(DamagedCacheError):
        Cache.open(cache).trajectory(0)


@BOTH
def test_what_has_no_record_does_not_exist(cache, form):
    (cache / "commits/index.json").unlink()
    (cache / "commits/trajectories-000001.json").unlink()
    opened = Cache.open(cache)
    assert len(opened) == 4 and not opened.finished and opened.indices().tolist() == [0, 1, 2, 3]
    with pytest.raises(
        NotInCacheError, match=r"trajectory 5 is not in .* yet \(trajectories shard 1 has no commit record\)"
    ):
        opened.trajectory(5)


@pytest.mark.parametrize("form", ["zarr"])
@pytest.mark.parametrize("name", ["manifest.json", "commits/index.json"])
def test_a_changed_value_in_a_record_is_an_error(cache, form, name):
    file = cache / name
    value = json.loads(file.read_bytes())
    value["trajectories" if "trajectories" in value else "source"] = 7
    file.write_text(json.dumps(value))
    with pytest.raises(DamagedCacheError, match="was changed or damaged"):
        Cache.open(cache)


@pytest.mark.parametrize("form", ["zarr"])
def test_a_changed_zarr_metadata_file_is_an_error(cache, form):
    file = cache / "trajectories.zarr/velocity/zarr.json"
    file.write_text(file.read_text().replace("bfloat16", "float16"))
    with pytest.raises(DamagedCacheError, match="velocity/zarr.json has checksum"):
        Cache.open(cache)


@pytest.mark.parametrize("form", ["zarr"])
def test_changed_prompts_are_an_error(cache, form):
    file = cache / "prompts.jsonl"
    file.write_text(file.read_text().replace("number 3", "number 9"))
    with pytest.raises(DamagedCacheError, match="a prompt 3 that cannot be read"):
        Cache.open(cache, verify="off").trajectory(3)
    with pytest.raises(DamagedCacheError, match="has checksum"):
        Cache.open(cache).trajectory(0)
    with pytest.raises(DamagedCacheError, match="has checksum"):
        list(Cache.open(cache).prompts)


def test_a_folder_that_is_no_cache_is_told_so(tmp_path):
    (tmp_path / "other").mkdir()
    with pytest.raises(NotACacheError, match=r"other has no manifest.json: it is not a cache"):
        Cache.open(tmp_path / "other")
    (tmp_path / "other/manifest.json").write_text('{"format": "something", "digest": "x"}')
    with pytest.raises(NotACacheError, match="has format 'something', expected 'secondcast-cache'"):
        Cache.open(tmp_path / "other")


@pytest.mark.parametrize("form", ["zarr"])
def test_a_newer_version_is_refused_by_name(cache, form):
    file = cache / "manifest.json"
    value = json.loads(file.read_bytes())
    value.pop("digest")
    file.write_bytes(with_digest({**value, "format_version": 99}))
    with pytest.raises(NotACacheError, match=r"version 99, this program reads 1: .*another version; .*, 'tests'"):
        Cache.open(cache)


@pytest.mark.parametrize("form", ["zarr"])
@pytest.mark.parametrize(
    ("section", "changes", "problem"),
    [
        (
            "sampling",
            {"latent_rule": "euler-9"},
            "sampling.latent_rule is 'euler-9', expected 'flow-match-euler' or 'scheduler'",
        ),
        ("sampling", {"negative": "x"}, "sampling.negative is an unknown key (its value is 'x')"),
        ("teacher", {"mask_kind": "bool"}, "teacher.mask_kind is an unknown key (its value is 'bool')"),
    ],
)
def test_an_intact_manifest_with_what_only_a_newer_version_writes_is_called_newer(
    cache, form, section, changes, problem
):
    file = cache / "manifest.json"
    value = json.loads(file.read_bytes())
    value.pop("digest")
    file.write_bytes(with_digest({**value, section: value[section] | changes}))
    with pytest.raises(NotACacheError) as error:
        Cache.open(cache)
    assert str(error.value) == (
        f"{file} is intact, but {problem}: a newer version of secondcast wrote it; upgrade secondcast, here and on "
        f"every machine that uses the cache"
    )


@pytest.mark.parametrize("form", ["zarr"])
def test_a_commit_record_of_a_newer_version_is_called_newer(cache, form):
    (cache / "commits/index.json").unlink(missing_ok=True)
    file = sorted((cache / "commits").glob("trajectories-*.json"))[0]
    value = json.loads(file.read_bytes())
    value.pop("digest")
    file.write_bytes(with_digest({**value, "signature": "s"}))
    with pytest.raises(NotACacheError, match=r"is intact, but signature is an unknown key .*: a newer version"):
        Cache.open(cache)


@pytest.mark.parametrize("form", ["zarr"])
@pytest.mark.parametrize("path", ["../secret", "/etc/passwd", "a/../../b"])
def test_a_record_that_leads_out_of_the_cache_is_refused(cache, form, path):
    record = next(iter(Cache.open(cache).records.values()))
    body = record.json_value() | {"files": [{"path": path, "bytes": 1, "xxh3_128": "0"}]}
    with pytest.raises(DamagedCacheError, match=f"path '{path}' is outside the cache"):
        CommitRecord.decode(with_digest({"format": "secondcast-commit", **body}), "record.json")


@pytest.mark.parametrize("form", ["zarr", "webdataset"])
def test_a_file_that_may_not_be_read_is_not_called_damaged(form):
    with outside_of_private_folders() as place:
        write_cache(place / "c", format=form)
        path = {"zarr": "trajectories.zarr/noise/c/0/0/0", "webdataset": "trajectories/000000.tar"}[form]
        (place / "c" / path).chmod(0)
        said = rf"^{place}/c/{path} cannot be read \(Permission denied\): this user lacks the permission; make it"
        with unprivileged():
            opened = Cache.open(place / "c")
            with pytest.raises(UnreadableFileError, match=said):
                opened.trajectory(0)
            with pytest.raises(UnreadableFileError, match=said):
                verify(place / "c", Silent())

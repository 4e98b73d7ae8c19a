"""Damage is never silent, and no file of a cache can make the reader run code or write outside of it."""

import hashlib
import io
import json
import pickle
import shutil
import tarfile
from pathlib import Path

import pytest

from secondcast.storage_schemas.errors import DamagedCacheError, NotACacheError, SecondcastError
from secondcast.storage_schemas.io.digests import xxh3_128
from secondcast.storage_schemas.io.folders import LocalFolder
from secondcast.storage_schemas.maintenance.repair import repair_cache
from secondcast.storage_schemas.maintenance.verify import verify
from secondcast.storage_schemas.progress import Silent
from secondcast.storage_schemas.reader import Cache, read_manifest
from secondcast.storage_schemas.schema.commits import (
    INDEX_FILE,
    CommitRecord,
    Records,
    encode_index,
    read_records,
    record_path,
)
from secondcast.storage_schemas.schema.json_files import with_digest
from tests.storage_schemas.caches import some_prompts, write_cache, write_keyed_cache
from tests.stress import corruption_fuzz
from tests.stress.corruption_fuzz import everything

INDEX = Path("commits") / INDEX_FILE


@pytest.mark.slow
def test_no_accident_gives_other_records_or_a_traceback_or_a_clean_report(tmp_path):
    table = corruption_fuzz.run(tmp_path, 152, 1)
    assert table.failures == [] and table.counts


def reseal(cache: Path) -> None:
    """Have manifest, records and index vouch for the files as they are now: not an accident any more."""
    manifest = read_manifest(folder := LocalFolder(cache))
    metadata = {name: xxh3_128((cache / name).read_bytes()) for name in manifest.metadata}
    (cache / "manifest.json").write_bytes(manifest.model_copy(update={"metadata": metadata}).encode())
    resealed = []
    for record in dict(read_records(folder)[0]).values():
        contents = {file.path: (cache / file.path).read_bytes() for file in record.files}
        files = tuple(
            file.model_copy(update={"bytes": len(contents[file.path]), "xxh3_128": xxh3_128(contents[file.path])})
            for file in record.files
        )
        resealed.append(record.model_copy(update={"files": files}))
        (cache / record_path(record.kind, record.shard)).write_bytes(resealed[-1].encode())
    (cache / INDEX).write_bytes(encode_index(Records(resealed, str(cache))))


def refused(work, error=DamagedCacheError) -> str:
    with pytest.raises(error) as raised:
        work()
    assert "\n" not in str(raised.value)
    return str(raised.value)


class Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (self.marker,))


@pytest.fixture
def evil_tar(tmp_path):
    """A cache whose first tar holds an absolute path, a way out, links and a pickle besides its samples."""
    cache, marker = tmp_path / "c", tmp_path / "marker"
    write_keyed_cache(cache, some_prompts(6), format="webdataset", shard_size=3)
    bomb = pickle.dumps(Bomb(marker))
    with tarfile.open(cache / "trajectories/000000.tar", "a") as tar:
        for name in (str(marker), "../../marker", "x.pkl", "y.pyd"):
            member = tarfile.TarInfo(name)
            member.size = len(bomb)
            tar.addfile(member, io.BytesIO(bomb))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            member = tarfile.TarInfo("link.safetensors")
            member.type, member.linkname = kind, str(marker)
            tar.addfile(member)
    reseal(cache)
    return cache


def test_a_tar_with_ways_out_links_and_pickles_is_read_by_position_alone(tmp_path, evil_tar):
    write_keyed_cache(tmp_path / "whole", some_prompts(6), format="webdataset", shard_size=3)
    assert everything(evil_tar, "once") == everything(tmp_path / "whole", "once")
    assert verify(evil_tar, Silent()).problems == () and not (tmp_path / "marker").exists()


def test_a_pickle_in_the_place_of_a_sample_is_an_error(tmp_path, evil_tar):
    with tarfile.open(evil_tar / "trajectories/000000.tar") as tar:
        member = tar.getmember("x.pkl")
    places = {"safetensors": [[member.offset_data, member.size]] * 3}
    (evil_tar / "trajectories/000000.index.json").write_text(json.dumps(places))
    reseal(evil_tar)
    assert "row 0 is not the expected sample" in refused(lambda: Cache.open(evil_tar).trajectory(0))
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    "index",
    [
        "[",
        "[1]",
        "{}",
        "[" * 10**5,
        '{"safetensors": 5}',
        '{"safetensors": []}',
        '{"safetensors": {"0": 1}}',
        '{"safetensors": [[-9, 9]]}',
        '{"safetensors": [["a", 1e400]]}',
        '{"safetensors": [[0, 123456789012345678901234567890]]}',
    ],
)
def test_a_byte_index_of_anything_else_is_an_error(tmp_path, index):
    write_cache(tmp_path / "c", format="webdataset")
    (tmp_path / "c/trajectories/000000.index.json").write_text(index)
    reseal(tmp_path / "c")
    message = refused(lambda: Cache.open(tmp_path / "c").trajectory(0))
    assert "trajectories shard 0: row 0 is not the expected sample" in message


def with_codecs(*names):
    def change(said):
        said["codecs"][0]["configuration"]["codecs"] = [{"name": name} for name in names]

    return change


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (with_codecs("bytes", "no.such"), r"its codecs is .*'no.such'.*, expected .*\['bytes', 'crc32c'\]"),
        (with_codecs("numcodecs.pickle"), r"its codecs is .*'numcodecs.pickle'"),
        (with_codecs("numcodecs.zstd"), r"its codecs is .*'numcodecs.zstd'"),
        (lambda said: said.update(codecs=[]), "it is not the description of a sharded array"),
        (lambda said: said.update(data_type="string"), "its data_type is 'string', expected 'bfloat16'"),
        (lambda said: said.update(shape=[8, 3, 4, 10**15]), "its row_shape is"),
        (lambda said: said["chunk_key_encoding"].update(name="v2"), "its chunk_key_encoding is"),
        (lambda said: said.update(zarr_format=2), "its zarr_format is 2, expected 3"),
        (lambda said: said.update(fill_value={"a": []}), "trajectories.zarr was not written by this program"),
    ],
)
def test_a_zarr_json_that_asks_for_anything_else_is_refused_before_zarr_acts_on_it(tmp_path, change, what):
    write_cache(tmp_path / "c")
    file = tmp_path / "c/trajectories.zarr/velocity/zarr.json"
    said = json.loads(file.read_text())
    change(said)
    file.write_text(json.dumps(said))
    reseal(tmp_path / "c")
    message = refused(lambda: Cache.open(tmp_path / "c"))
    assert "was not written by this program, although the manifest has its checksum" in message
    with pytest.raises(DamagedCacheError, match=what):
        Cache.open(tmp_path / "c")


def test_arrays_are_not_read_as_their_group_describes_them(tmp_path):
    write_cache(tmp_path / "c")
    truth = everything(tmp_path / "c", "once")
    file = tmp_path / "c/trajectories.zarr/zarr.json"
    group = json.loads(file.read_text())
    array = json.loads((tmp_path / "c/trajectories.zarr/velocity/zarr.json").read_text())
    with_codecs("no.such")(array)
    group["consolidated_metadata"] = {"kind": "inline", "must_understand": False, "metadata": {"velocity": array}}
    file.write_text(json.dumps(group))
    reseal(tmp_path / "c")
    assert everything(tmp_path / "c", "once") == truth


def test_a_repair_never_writes_through_a_link_that_leads_out(tmp_path):
    cache, outside = tmp_path / "c", tmp_path / "outside"
    write_cache(cache)
    shutil.copytree(cache, tmp_path / "copy")
    outside.mkdir()
    shutil.rmtree(cache / "trajectories.zarr/velocity/c")
    (cache / "trajectories.zarr/velocity/c").symlink_to(outside)
    message = refused(lambda: repair_cache(cache, tmp_path / "copy", Silent()))
    assert f"would be written to {outside}/0/0/0, outside the cache, through a link: replace" in message
    assert not list(outside.rglob("*")), "not even a folder"


def test_a_cache_behind_a_link_and_files_that_are_links_are_read_as_any_other(tmp_path):
    write_cache(tmp_path / "blobs")
    (tmp_path / "c").mkdir()
    for path in (tmp_path / "blobs").rglob("*"):
        if path.is_file():
            link = tmp_path / "c" / path.relative_to(tmp_path / "blobs")
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)
    (tmp_path / "link").symlink_to(tmp_path / "c")
    assert everything(tmp_path / "link", "once") == everything(tmp_path / "blobs", "once")
    (tmp_path / "blobs/prompts.offsets").unlink()
    assert repair_cache(tmp_path / "link", None, Silent()).left == ()
    assert not (tmp_path / "blobs/prompts.offsets").exists()


@pytest.mark.parametrize("path", ["../secret", "/etc/passwd", "a\\..\\b", "a/\0", "tokenizer/../../x"])
def test_a_manifest_that_leads_out_of_the_cache_is_refused(tmp_path, path):
    write_cache(tmp_path / "c")
    manifest = read_manifest(LocalFolder(tmp_path / "c"))
    teacher = manifest.teacher.model_copy(update={"tokenizer": {path: "00"}})
    for change in ({"metadata": {path: "00"}}, {"teacher": teacher}):
        (tmp_path / "c/manifest.json").write_bytes(manifest.model_copy(update=change).encode())
        assert f"path {path!r} is outside the cache" in refused(lambda: Cache.open(tmp_path / "c"))


@pytest.mark.parametrize("path", ["manifest.json", "prompts.jsonl", "commits/index.json", "", "other/000000.tar"])
def test_a_record_that_vouches_for_anything_but_shards_is_refused(tmp_path, path):
    write_cache(tmp_path / "c")
    body = Cache.open(tmp_path / "c").records["trajectories", 0].json_value()
    body["files"] = [{"path": path, "bytes": 1, "xxh3_128": "0"}]
    data = with_digest({"format": "secondcast-commit", **body})
    message = refused(lambda: CommitRecord.decode(data, "record.json"))
    assert f"path {path!r} is in no folder of shards (trajectories.zarr, trajectories, embeddings.zarr" in message


@pytest.mark.parametrize(
    "entry",
    [5, {}, {"kind": [], "shard": 0}, {"kind": "trajectories", "shard": "0"}, {"files": 7}, {"files": [{"path": 1}]}],
)
def test_an_index_of_anything_else_is_an_error(tmp_path, entry):
    write_cache(tmp_path / "c")
    data = (tmp_path / "c" / INDEX).read_bytes()
    second = data.split(b"\n")[1]
    partial = isinstance(entry, dict) and "files" in entry
    line = json.dumps({**json.loads(second.rstrip(b",")), **entry} if partial else entry).encode()
    body = data[: data.rindex(b"\n],")].replace(second, line + b",")
    digest = hashlib.blake2b(body, digest_size=16).hexdigest()
    (tmp_path / "c" / INDEX).write_bytes(body + f'\n],"digest":"{digest}"}}\n'.encode())

    def read_all():
        cache = Cache.open(tmp_path / "c")
        return [cache.records[key] for key in cache.records]

    assert f"{tmp_path}/c/commits/index.json is not a valid" in refused(read_all)


@pytest.mark.thorough
@pytest.mark.parametrize("data", [b"[1]", b"7", b"[" * 10**5, b'{"a": NaN}', b'{"a": "\\ud800"}', b"\xff", b"{}"])
@pytest.mark.parametrize("name", ["manifest.json", "commits/index.json", "commits/trajectories-000000.json"])
def test_json_of_any_other_form_is_an_error_of_one_line(tmp_path, name, data):
    write_cache(tmp_path / "c")
    (tmp_path / "c" / name).write_bytes(data)
    if name.endswith("-000000.json"):
        (tmp_path / "c" / INDEX).unlink()
        assert any(problem.path == name for problem in verify(tmp_path / "c", Silent()).problems)
    message = refused(lambda: Cache.open(tmp_path / "c"), SecondcastError)
    assert f"{tmp_path}/c/{name} " in message


def test_a_changed_or_lost_tokenizer_is_an_error(tmp_path):
    write_keyed_cache(tmp_path / "c", some_prompts(6))
    file = tmp_path / "c/tokenizer/spiece.model"
    for damage in (lambda: file.write_bytes(b"pieceS"), file.unlink):
        damage()
        with pytest.raises(
            DamagedCacheError, match=r"tokenizer/spiece.model has sha256 .*, the manifest has b6aa423de4f79355"
        ):
            Cache.open(tmp_path / "c").tokenizer_files  # noqa: B018
    with pytest.raises(NotACacheError):
        Cache.open(tmp_path / "c/tokenizer")

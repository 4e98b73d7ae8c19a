"""sha256 sums of weights are computed once per file, and never believed of a file that may have changed."""

import hashlib
import json
import os
import time

import pytest

from secondcast.storage_schemas.io import hash_memory
from secondcast.storage_schemas.io.digests import weight_sha256
from secondcast.storage_schemas.io.hash_memory import MEMORY_FILE, memory_file


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("SECONDCAST_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(hash_memory, "RESTED_SECONDS", -1.0)
    return tmp_path / "home"


@pytest.fixture
def weights(tmp_path):
    file = tmp_path / "weights.safetensors"
    file.write_bytes(b"one")
    return file


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def forbid_reading(monkeypatch):
    monkeypatch.setattr(hashlib, "file_digest", None)


def test_a_file_is_read_once(home, weights, monkeypatch):
    assert weight_sha256(weights) == sha256(b"one")
    forbid_reading(monkeypatch)
    assert weight_sha256(weights) == sha256(b"one")
    assert list(json.loads((home / MEMORY_FILE).read_bytes())) == [str(weights)]


@pytest.mark.parametrize("how", ["in place", "by another file", "back to the old time"])
def test_a_changed_file_of_the_same_size_is_read_again(home, weights, how):
    weight_sha256(weights)
    before = weights.stat()
    if how == "by another file":
        (weights.parent / "new").write_bytes(b"two")
        (weights.parent / "new").rename(weights)
    else:
        # The clock of a file system may stand still for some milliseconds.
        time.sleep(0.02)
        weights.write_bytes(b"two")
    if how == "back to the old time":
        os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert weight_sha256(weights) == sha256(b"two")


def test_a_file_that_was_just_written_is_not_remembered(home, weights, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("SECONDCAST_CACHE_HOME", str(home))
    assert weight_sha256(weights) == sha256(b"one") and not home.exists()


@pytest.mark.parametrize(
    "damage",
    [b"", b"{", b"[]", b"7", b'{"x": 3}', b"\xff", b"[" * 100_000, b'{"PATH": {"sha256": "no"}}', b'{"PATH": {}}'],
)
def test_a_damaged_memory_is_ignored_and_written_anew(home, weights, damage, monkeypatch):
    home.mkdir()
    (home / MEMORY_FILE).write_bytes(damage.replace(b"PATH", str(weights).encode()))
    assert weight_sha256(weights) == sha256(b"one")
    forbid_reading(monkeypatch)
    assert weight_sha256(weights) == sha256(b"one")


def test_without_a_place_to_write_it_works_without_a_memory(home, weights):
    home.write_text("a file where the folder should be")
    assert weight_sha256(weights) == weight_sha256(weights) == sha256(b"one")


def test_files_that_are_gone_are_forgotten(home, weights, tmp_path):
    other = tmp_path / "other"
    other.write_bytes(b"other")
    weight_sha256(other)
    other.unlink()
    weight_sha256(weights)
    assert list(json.loads((home / MEMORY_FILE).read_bytes())) == [str(weights)]


def test_what_the_hub_named_by_its_sha256_is_not_read_at_all(home, tmp_path, monkeypatch):
    blob = tmp_path / ("ab" * 32)
    blob.write_bytes(b"anything")
    (tmp_path / "model.safetensors").symlink_to(blob)
    forbid_reading(monkeypatch)
    assert weight_sha256(tmp_path / "model.safetensors") == "ab" * 32 and not home.exists()


def test_the_memory_lies_where_the_user_keeps_caches(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("SECONDCAST_CACHE_HOME")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert memory_file() == tmp_path / ".cache/secondcast" / MEMORY_FILE
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert memory_file() == tmp_path / "x/secondcast" / MEMORY_FILE
    monkeypatch.setenv("SECONDCAST_CACHE_HOME", str(tmp_path / "own"))
    assert memory_file() == tmp_path / "own" / MEMORY_FILE


def test_a_remembered_file_that_cannot_be_asked_for_is_forgotten(home, weights):
    home.mkdir()
    entry = {"state": [], "sha256": "0" * 64}
    (home / MEMORY_FILE).write_text(json.dumps({f"/{'x' * 300}": entry}))
    assert weight_sha256(weights) == sha256(b"one")
    assert list(json.loads((home / MEMORY_FILE).read_bytes())) == [str(weights)]

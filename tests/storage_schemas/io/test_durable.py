"""Locks of writers where the system has none; readers need none."""

import subprocess
import sys

import pytest

from secondcast.storage_schemas.errors import StorageError
from secondcast.storage_schemas.io import durable
from tests.storage_schemas.caches import write_cache

READS = """
import sys
sys.modules["fcntl"] = None
from secondcast import Cache, cli
cache = Cache.open(sys.argv[1])
print(cache.trajectory(1).velocity_KSC.shape, cache.embedding(1).shape)
folder = sys.argv[1]
for view in (["summary", folder], ["show", folder, "1"], ["verify", folder], ["diff", folder, folder]):
    cli.app(["inspect", *view], standalone_mode=False)
"""


@pytest.mark.thorough
@pytest.mark.parametrize("form", ["zarr", "webdataset"])
def test_a_cache_is_read_and_verified_on_a_system_without_fcntl(tmp_path, form):
    write_cache(tmp_path / "cache", format=form, compression="lossless")
    done = subprocess.run(
        [sys.executable, "-c", READS, str(tmp_path / "cache")], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    first, *views = done.stdout.splitlines()
    assert first == "(3, 4, 2) (5, 6)", first
    assert any("6 of 6 committed" in line for line in views)


def test_a_writer_without_fcntl_is_refused_in_one_line_that_names_the_folder(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with (
        pytest.raises(StorageError, match=rf"^{tmp_path}/run cannot be locked: this system has no flock ") as caught,
        durable.locked(tmp_path / "run"),
    ):
        pass
    assert "written on Linux" in str(caught.value) and "\n" not in str(caught.value)

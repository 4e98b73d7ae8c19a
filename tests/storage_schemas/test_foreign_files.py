"""What deletes files of a cache deletes those that this program wrote: a user's files beside them stay."""

import pytest

from secondcast.storage_schemas.embeddings import drop_embeddings
from secondcast.storage_schemas.io.folders import LocalFolder
from secondcast.storage_schemas.maintenance.verify import verify
from secondcast.storage_schemas.progress import Silent
from secondcast.storage_schemas.schema.journal import finish_pending
from tests.storage_schemas.caches import write_cache

FOREIGN = {
    "next": ("next/notes.txt", "next/trajectories.zarr/mine/data.bin"),
    "embeddings": ("embeddings/mine.npy", "embeddings.zarr/mine.npy", "embeddings/000000.tar.bak"),
}
DELETE = {"next": finish_pending, "embeddings": drop_embeddings}


@pytest.mark.parametrize("form", ["zarr", "webdataset"])
@pytest.mark.parametrize("what", FOREIGN)
def test_foreign_files_stay_and_are_named(tmp_path, form, what):
    write_cache(tmp_path / "c", format=form)
    folder = LocalFolder(tmp_path / "c")
    known = {"next": "next/prompts.jsonl", "embeddings": ""}[what]
    for name in (*FOREIGN[what], known):
        if name:
            folder.replace(name, b"mine")
    DELETE[what](folder)
    assert all(folder.read(name) == b"mine" for name in FOREIGN[what])
    assert not known or folder.size(known) is None
    foreign = {problem.path for problem in verify(tmp_path / "c", Silent()).problems if problem.foreign}
    assert what == "embeddings" or foreign == set(FOREIGN[what])
    if what == "embeddings":
        assert set(folder.names("embeddings")) | {
            name for name in folder.names("embeddings.zarr") if not name.endswith("zarr.json")
        } == set(FOREIGN[what])

"""Phase 1 and the command line on an object store."""

import pytest

from secondcast.storage_schemas.io.folders import open_folder
from secondcast.storage_schemas.reader import Cache
from tests.cache_builder.building import build_cache, data_files
from tests.commands.test_cli import secondcast


@pytest.mark.slow
def test_a_build_on_a_store_has_the_bytes_of_a_local_one(s3, tmp_path, dev_teacher, prompt_file):
    result = build_cache(f"{s3.url}/c", dev_teacher, prompt_file)
    build_cache(tmp_path / "c", dev_teacher, prompt_file)
    assert (result.location, result.trajectories) == (f"{s3.url}/c", 6)
    folder = open_folder(f"{s3.url}/c")
    remote = {name: folder.read(name) for name in folder.names() if not name.startswith("commits/")}
    assert remote == data_files(tmp_path / "c") and Cache.open(f"{s3.url}/c").finished
    s3.reset()
    build_cache(f"{s3.url}/c", dev_teacher, prompt_file)
    assert {method for method, _ in s3.proxy.requests} <= {"GET", "HEAD"}


@pytest.mark.thorough
def test_the_command_line_takes_the_url_of_a_store(s3, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"a red circle and {word}\n" for word in ("one", "two", "three", "four", "five")))

    def told(*words: str) -> str:
        code, said, heard = secondcast(*words, capsys=capsys)
        assert code == 0, heard
        return said

    cache = f"{s3.url}/cache"
    words = ["--teacher", "pocket", "--prompts", str(prompts), "--limit", "4", "--steps", "2"]
    assert f"{cache}: 4 trajectories of 4 prompts" in told("build", cache, *words)
    summary = told("inspect", "summary", cache)
    assert f"{cache} (finished)" in summary and "4 of 4 committed" in summary
    assert "a red circle and one" in told("inspect", "show", cache, "0")

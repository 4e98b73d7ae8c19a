"""Phase 1 and the command line on an object store."""

import os
import subprocess
import sys
from pathlib import Path

from storage_schemas.folders import open_folder
from storage_schemas.reader import Cache
from tests.cache_builder.building import build_cache, data_files

ROOT = Path(__file__).resolve().parents[2]


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


def test_the_command_line_takes_the_url_of_a_store(s3, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"a red circle and {word}\n" for word in ("one", "two", "three", "four", "five")))

    def understudy(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", "import cli; cli.main()", *words],
            cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    cache = f"{s3.url}/cache"
    words = ["--teacher", "pocket", "--prompts", str(prompts), "--limit", "4", "--steps", "2"]
    assert f"{cache}: 4 trajectories of 4 prompts" in understudy("build", cache, *words)
    summary = understudy("inspect", "summary", cache)
    assert f"{cache} (finished)" in summary and "4 of 4 committed" in summary
    assert "a red circle and one" in understudy("inspect", "show", cache, "0")

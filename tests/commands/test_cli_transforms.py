"""convert, subset, merge and inspect diff as a user meets them."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from secondcast.storage_schemas.io.folders import LocalFolder
from secondcast.storage_schemas.reader import Cache, read_manifest
from secondcast.storage_schemas.writer import CacheWriter
from tests.commands.test_cli import secondcast
from tests.storage_schemas.caches import data_files, keyed_arrays, some_prompts, write_keyed_cache


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_there_and_back_on_the_command_line(capsys):
    write_keyed_cache("a", some_prompts(6), format="webdataset")
    code, said, heard = secondcast("convert", "a", "b", "--format", "zarr", "--latents", "stored", capsys=capsys)
    assert code == 0 and re.fullmatch(r"b: 6 trajectories of 6 prompts, [\d.]+ KiB\n", said), said
    assert "convert: 6 of 6 trajectories" in heard
    code, said, _ = secondcast("inspect", "diff", "a", "b", capsys=capsys)
    assert code == 0 and said.splitlines()[0].startswith('sampling.storage.format: "webdataset" | "zarr": the same tra')
    assert secondcast("convert", "b", "c", "--format", "webdataset", "--latents", "derived", capsys=capsys)[0] == 0
    code, said, _ = secondcast("inspect", "diff", "a", "c", "--json", capsys=capsys)
    assert code == 0 and json.loads(said)["identical"]
    assert data_files(Path("a")) == data_files(Path("c"))


def test_parts_are_cut_out_and_merged_again(capsys):
    prompts = some_prompts(6)
    write_keyed_cache("a", prompts, format="webdataset", samples_per_prompt=2)
    # As an editor on another system saves it.
    Path("ids.txt").write_bytes(f"\ufeff{prompts[1].text}\r\n{prompts[4].id}\r\nnix\r\n".encode())
    code, said, heard = secondcast("subset", "a", "b", "--ids", "ids.txt", capsys=capsys)
    assert code == 0 and said.startswith("b: 4 trajectories of 2 prompts, ")
    assert "1 of 3 lines match no prompt of a, the first: 'nix'" in heard
    assert "2 of 6 prompts, 4 of 12 trajectories" in heard
    assert secondcast("subset", "a", "c", "--source", "made-up", "--num-prompts", "4", "-q", capsys=capsys)[0] == 0
    code, said, heard = secondcast("merge", "b", "c", "a", "all", capsys=capsys)
    assert code == 0 and said.startswith("all: 12 trajectories of 6 prompts, ")
    assert "12 trajectories of 6 prompts from 3 caches (12 duplicates dropped)" in heard
    assert [p.id for p in Cache.open("all").prompts][:2] == [prompts[1].id, prompts[4].id]


def test_what_is_missing_and_what_differs_is_said(capsys):
    prompts = some_prompts(6)
    write_keyed_cache("a", prompts, format="webdataset", leave_out=(("trajectories", 1), ("embeddings", 1)))
    code, said, _ = secondcast("convert", "a", "b", "--latents", "stored", capsys=capsys)
    assert code == 0 and said.splitlines()[0].startswith("b: 4 of 6 trajectories of 6 prompts, ")
    assert said.splitlines()[1] == (
        "2 trajectories and 2 embeddings are not copied, because no source holds all rows of their shards yet: finish "
        "its build, then run the same command again"
    )
    manifest = read_manifest(LocalFolder(Path("a")))
    writer = CacheWriter.create_or_resume("c", manifest, prompts, {"spiece.model": b"pieces"})
    for kind in ("embeddings", "trajectories"):
        for shard in writer.missing(kind):
            arrays = keyed_arrays(writer, shard, kind)
            if kind == "trajectories":
                arrays["guidance"] += np.float32(1)
            writer.commit(kind, shard, arrays, seconds=0, provenance={})
    code, said, _ = secondcast("merge", "a", "c", "d", capsys=capsys)
    assert code == 0 and said.splitlines()[0] == (
        "4 trajectories differ in their bits between the caches (built on another machine?): those of the first "
        "cache are kept"
    )
    assert said.splitlines()[1].startswith("d: 6 trajectories of 6 prompts, ")


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["convert", "a"], 2, r"Missing argument 'DST'"),
        (["convert", "a", "b", "--format", "npz"], 2, r"'npz' is not one of 'zarr', 'webdataset'"),
        (
            ["convert", "a", "b", "--compression", "zip"],
            2,
            r"--compression: 'zip' is not one of 'none', 'lossless', 'int8'",
        ),
        (
            ["convert", "a", "b", "--compression", "int8"],
            1,
            r"compression int8 rounds the velocity, .*; use --latents stored",
        ),
        (["convert", "a", "b", "--latents", "none"], 2, r"'none' is not one of 'derived', 'stored'"),
        (
            ["convert", "a", "a"],
            1,
            r"the target .*a and the source .*a are one inside the other, but a source is never modified: ",
        ),
        (["convert", "nix", "b"], 1, r"nix is not a folder: give the output folder of `secondcast build`"),
        (["convert", "a", "taken"], 1, r"taken has 'x' and 0 more, but no manifest.json"),
        (
            ["subset", "a", "b"],
            1,
            r"subset needs one of --source NAME, --ids FILE and --num-prompts N; use `convert`",
        ),
        (
            ["subset", "a", "b", "--num-prompts", "0"],
            2,
            "--num-prompts is .?0.?, expected at least 1",
        ),
        (["subset", "a", "b", "--ids", "nix.txt"], 1, r"no prompt file nix.txt: expected a text file"),
        (["subset", "a", "b", "--ids", "taken/x"], 1, r"nothing of a is selected: it has 2 prompts \(made-up 2\), the"),
        (["subset", "a", "b", "--source", "nix"], 1, r"--source 'nix' is not in a: its sources are made-up 2"),
        (["merge", "a", "b"], 1, r"merge has 1 cache, expected two or more and the target: A B ... TARGET"),
        (["merge", "a", "a", "a"], 1, r"the target .*a and the source .*a are one inside the other"),
        (["inspect", "diff", "a"], 2, r"Missing argument 'B'"),
        (["inspect", "diff", "a", "nix"], 1, r"nix is not a folder"),
    ],
)
def test_bad_input_is_one_clear_line(words, code, message, capsys):
    write_keyed_cache("a", some_prompts(2), format="webdataset")
    Path("taken").mkdir()
    Path("taken/x").write_text("nix\n")
    found, _, heard = secondcast(*words, capsys=capsys)
    last = heard.strip().splitlines()[-1]
    assert (found, last.startswith("secondcast: ")) == (code, True)
    assert re.search(message, last), last
    assert "Traceback" not in heard and not Path("b").exists()


@pytest.mark.parametrize("words", [["convert"], ["subset"], ["merge"], ["inspect", "diff"]])
def test_every_help_text_has_an_example_of_its_own_command(words, capsys):
    code, said, _ = secondcast(*words, "--help", capsys=capsys)
    assert code == 0 and f"Example: secondcast {' '.join(words)}" in " ".join(said.split())

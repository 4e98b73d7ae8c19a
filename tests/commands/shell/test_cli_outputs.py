"""Files that commands write: what is there stays, unless it is the command's own, or --overwrite is given."""

import json
import os
import stat
import threading
from pathlib import Path

import pytest

from secondcast.commands.shell import outputs
from secondcast.commands.shell.outputs import RECORD_FILE, OutputFile, OutputFolder
from secondcast.storage_schemas.errors import SettingsError, SettingsMismatchError
from tests.commands.test_cli import secondcast

PROMPTS = {
    "pocket": ["prompts", "pocket", "FILE", "--num-prompts", 3],
    "commontext": ["prompts", "commontext", "FILE", "--num-prompts", 3],
    "compbench": ["prompts", "compbench", "FOLDER", "FILE"],
}


@pytest.mark.parametrize("kind", PROMPTS)
def test_a_prompt_set_replaces_no_file(tmp_path, kind, capsys):
    folder, file = tmp_path / "bench", tmp_path / ("set.jsonl" if kind == "compbench" else "set.txt")
    folder.mkdir()
    for name in ("color", "complex", "non_spatial", "shape", "spatial", "texture"):
        (folder / f"{name}_train.txt").write_text(f"a {name} thing\n")
    words = [{"FILE": file, "FOLDER": folder}.get(word, word) for word in PROMPTS[kind]]
    file.write_text("mine")
    code, said, heard = secondcast(*words, capsys=capsys)
    assert (code, said) == (1, "") and file.read_text() == "mine"
    assert heard == f"secondcast: {file} exists and would be lost: give another FILE, or --overwrite to replace it\n"
    assert secondcast(*words, "--overwrite", capsys=capsys)[0] == 0
    made = file.read_text()
    assert made != "mine" and secondcast(*words, capsys=capsys)[0] == 0 and file.read_text() == made


def test_a_picture_of_scores_replaces_no_file_and_is_checked_first(tmp_path, capsys):
    (tmp_path / "mine.png").write_bytes(b"mine")
    for name, message in (
        (
            "mine.png",
            f"{tmp_path}/mine.png exists and would be lost: give another --sample-grid, or --overwrite to",
        ),
        ("mine.tiff", f"--sample-grid is {tmp_path}/mine.tiff, expected a picture such as mine.png"),
    ):
        words = ["evaluate", "score", "no-run", "--pocket", "--sample-grid", tmp_path / name]
        code, said, heard = secondcast(*words, capsys=capsys)
        assert (code, said) == (1, "") and heard.startswith(f"secondcast: {message}")
    assert (tmp_path / "mine.png").read_bytes() == b"mine"


@pytest.mark.parametrize("name", ["prompts.txt", "cache", ".hidden", "report.html"])
def test_the_demo_begins_in_no_folder_with_other_files(tmp_path, name, capsys):
    (tmp_path / name).write_text("x")
    code, said, heard = secondcast("demo", tmp_path, capsys=capsys)
    assert (code, said) == (1, "") and heard == (
        f"secondcast: {tmp_path} has {name!r} and 0 more, but no {RECORD_FILE}, so this command did not create it: "
        f"give a new or empty folder\n"
    )
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [(name, "x")]


def test_a_demo_goes_on_with_its_flags_only(tmp_path, capsys):
    OutputFolder.open(tmp_path, "demo", (), settings={"count": 64, "pretrain_steps": 1, "steps": 1}, alone=True)
    code, said, heard = secondcast("demo", tmp_path, "--num-prompts", 64, "--pretrain-steps", 1, capsys=capsys)
    assert (code, said) == (1, "") and heard == (
        f"secondcast: {tmp_path} was started with steps = 1, not 40: give the original flags, or another folder\n"
    )
    assert [file.name for file in tmp_path.iterdir()] == [RECORD_FILE]


def test_a_folder_of_results_is_written_again_and_files_of_others_stay(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    folder = OutputFolder.open(tmp_path, "evaluate table", ["a.md", "b.png"])
    folder.write("a.md", b"one")
    folder.write("a.md", b"two")
    again = OutputFolder.open(tmp_path, "evaluate table", ["a.md", "b.png"])
    again.write("a.md", b"three")
    (tmp_path / "b.png").write_bytes(b"mine")
    (tmp_path / "a.md").write_bytes(b"edited")
    for name in ("a.md", "b.png"):
        message = f"^{tmp_path}/{name} exists and differs from what `secondcast evaluate table` wrote: move it, or give"
        with pytest.raises(SettingsError, match=message):
            OutputFolder.open(tmp_path, "evaluate table", [name])
        with pytest.raises(SettingsError, match=message):
            again.write(name, b"lost")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.name != RECORD_FILE} == {
        "notes.txt": b"mine", "a.md": b"edited", "b.png": b"mine",
    }  # fmt: skip
    OutputFolder.open(tmp_path, "evaluate table", ["a.md"], overwrite=True).write("a.md", b"four")
    assert (tmp_path / "a.md").read_bytes() == b"four"


def test_a_result_that_is_no_longer_made_is_removed_and_a_foreign_file_stays(tmp_path):
    OutputFolder.open(tmp_path, "evaluate paper", ["a.png", "b.png"]).write("a.png", b"ours")
    (tmp_path / "b.png").write_bytes(b"mine")
    again = OutputFolder.open(tmp_path, "evaluate paper", ["a.png", "b.png"], overwrite=True)
    for name in ("a.png", "b.png", "c.png"):
        again.remove(name)
    assert not (tmp_path / "a.png").exists() and (tmp_path / "b.png").read_bytes() == b"mine"


@pytest.mark.parametrize("before", [b"one", None])
@pytest.mark.parametrize("killed_at", [0, 1])
def test_a_folder_of_results_killed_anywhere_is_taken_up_again(tmp_path, before, killed_at, monkeypatch):
    folder = OutputFolder.open(tmp_path, "demo", ["a.md"], alone=True)
    if before is not None:
        folder.write("a.md", before)
    replace, calls = outputs.durable.replace, []

    def killed(path, data):
        if len(calls) == killed_at:
            raise KeyboardInterrupt
        calls.append(path)
        replace(path, data)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(outputs.durable, "replace", killed)
        folder.write("a.md", b"two")
    again = OutputFolder.open(tmp_path, "demo", ["a.md"], alone=True)
    again.write("a.md", b"three")
    assert (tmp_path / "a.md").read_bytes() == b"three"


def test_a_folder_of_results_of_another_command_or_a_damaged_record_is_refused(tmp_path):
    OutputFolder.open(tmp_path, "demo", (), settings={"count": 64}, alone=True)
    with pytest.raises(SettingsError, match=f"^{tmp_path} has results of `secondcast demo`: give another folder$"):
        OutputFolder.open(tmp_path, "evaluate table", ())
    with pytest.raises(SettingsMismatchError, match=f"^{tmp_path} was started with count = 64, not 65: give the o"):
        OutputFolder.open(tmp_path, "demo", (), settings={"count": 65}, alone=True)
    (tmp_path / RECORD_FILE).write_text(json.dumps({"files": 3}))
    with pytest.raises(SettingsError, match=rf"^{tmp_path}/{RECORD_FILE} cannot be read \(not what this"):
        OutputFolder.open(tmp_path, "demo", (), alone=True)
    assert (tmp_path / RECORD_FILE).read_text() == '{"files": 3}'


def test_a_link_is_followed_and_not_replaced(tmp_path):
    (tmp_path / "link.txt").symlink_to(tmp_path / "real.txt")
    OutputFile.open(tmp_path / "link.txt").write(b"data")
    assert (tmp_path / "link.txt").is_symlink() and (tmp_path / "real.txt").read_bytes() == b"data"
    with pytest.raises(SettingsError, match=f"^{tmp_path}/link.txt exists and would be lost: give another --out, or"):
        OutputFile.open(tmp_path / "link.txt")


def test_a_pipe_is_written_to_and_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    got = []
    reader = threading.Thread(target=lambda: got.append((tmp_path / "pipe").read_bytes()))
    reader.start()
    OutputFile.open(tmp_path / "pipe").write(b"data")
    reader.join(10)
    assert got == [b"data"] and stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    OutputFile.open(Path("/dev/null"), overwrite=True).write(b"data")
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)


def test_a_file_that_came_into_being_meanwhile_stays(tmp_path):
    file = OutputFile.open(tmp_path / "a.txt")
    (tmp_path / "a.txt").write_bytes(b"mine")
    with pytest.raises(SettingsError, match=f"^{tmp_path}/a.txt was created meanwhile and is kept: give another"):
        file.write(b"data")
    assert (tmp_path / "a.txt").read_bytes() == b"mine"

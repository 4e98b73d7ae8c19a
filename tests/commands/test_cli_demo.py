"""`secondcast demo`: what it advises can be typed, and an error says whose flags it names."""

import shlex
import sys

import pytest
import typer

from secondcast import cli
from secondcast.commands import demo
from secondcast.commands.demo import _FLAGS, _teacher_picture, _where
from secondcast.commands.shell.outputs import OutputFolder
from secondcast.evaluation.settings.pocket import PocketSampling
from secondcast.storage_schemas.errors import SettingsError
from tests.commands.test_cli import secondcast
from tests.project.test_docs import parse


def test_the_commands_that_the_demo_advises_are_ones_that_the_program_takes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["secondcast", "demo"])
    _where(tmp_path / "my demo", {"init-student": 20.0, "train": 41.0})
    *lines, last = [line.strip() for line in capsys.readouterr().out.split("Next, try:\n")[1].splitlines()]
    assert last == f"Open the report in a browser: file://{tmp_path}/my%20demo/report.html"
    assert len(lines) == 4
    for line in lines:
        assert line.startswith("secondcast ")
        values = parse(line)
        place = values.get("cache") or str(values.get("student"))
        assert place in (str(tmp_path / "my demo/cache"), str(tmp_path / "my demo/student"))


@pytest.mark.parametrize(
    ("argv", "program"), [("/x/my venv/secondcast", "'/x/my venv/secondcast'"), ("-c", "secondcast")]
)
def test_the_program_is_named_as_it_can_be_called(argv, program, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [argv, "demo"])
    monkeypatch.setattr("shutil.which", lambda name: None)
    _where(tmp_path, {"train": 1.0})
    assert f"\n  {program} inspect summary {shlex.quote(str(tmp_path / 'cache'))}\n" in capsys.readouterr().out


def test_the_flags_of_the_demo_are_the_ones_it_knows():
    command = typer.main.get_command(cli.app).commands["demo"]
    flags = {flag for parameter in command.params for flag in parameter.opts if flag.startswith("--")}
    assert flags == set(_FLAGS)


def test_the_demo_states_what_it_does_and_how_long_it_takes(tmp_path, capsys, monkeypatch):
    # The first part fails, so that nothing else runs.
    (tmp_path / "d").mkdir()
    OutputFolder.open(tmp_path / "d", "demo", (), settings={"count": 100, "pretrain_steps": 590, "steps": 40})
    (tmp_path / "d/prompts.txt").mkdir()
    code, said, _ = secondcast("demo", tmp_path / "d", "--num-prompts", 100, capsys=capsys)
    assert code == 1 and said == ""
    (tmp_path / "d/prompts.txt").rmdir()
    monkeypatch.setattr(demo, "_teacher_picture", stop)
    code, said, heard = secondcast("demo", tmp_path / "d", "--num-prompts", 100, capsys=capsys)
    assert code == 1 and heard == "secondcast: stopped\n"
    first, _, second = said.splitlines()
    assert first.startswith("Records 100 images of the pocket teacher") and first.endswith(
        "3 minutes on two idle cores with the default options)."
    )
    assert second == "[1/6] captions of the pocket world, and the teacher's images of some"


def stop(*_):
    raise SettingsError("stopped")


@pytest.mark.thorough
def test_the_first_picture_shows_the_captions_that_the_comparison_shows_first():
    picture = _teacher_picture(PocketSampling(steps=2), "cpu")
    # Twelve cells of one image, in three columns.
    assert picture.size == (3 * 116 + 14, 4 * 160 + 14)
    assert len({picture.crop((14 + 116 * column, 28, 110 + 116 * column, 124)).tobytes() for column in range(3)}) == 3


@pytest.mark.thorough
def test_an_error_in_a_part_names_the_command_whose_flags_it_advises(tmp_path, capsys):
    words = ["demo", tmp_path / "d", "--num-prompts", "64", "--device", "cpu", "--quiet"]
    asked = {"count": 64, "pretrain_steps": 590, "steps": 40}
    OutputFolder.open(tmp_path / "d", "demo", (), settings=asked)
    (tmp_path / "d/cache").mkdir()
    (tmp_path / "d/cache/manifest.json").write_text('{"format": "other"}')
    code, _, heard = secondcast(*words, capsys=capsys)
    assert code == 1 and heard.count("\n") == 1 and "flags" not in heard
    (tmp_path / "d/cache/manifest.json").unlink()
    flags = ["--teacher", "pocket", "--prompts", tmp_path / "d/prompts.txt", "--steps", "2", "--dtype", "float32"]
    assert secondcast("build", tmp_path / "d/cache", *flags, "--limit", "3", "--quiet", capsys=capsys)[0] == 0
    code, said, heard = secondcast(*words, capsys=capsys)
    assert code == 1 and heard.count("\n") == 1 and "[1/6]" not in said
    assert "was built with sampling.steps = 2, requested 20: " in heard
    (tmp_path / "d/prompts.txt").unlink()
    (tmp_path / "d/prompts.txt").mkdir()
    code, _, heard = secondcast(*words, capsys=capsys)
    assert code == 1 and heard.startswith(f"secondcast: {tmp_path}/d/prompts.txt exists and differs from what ")

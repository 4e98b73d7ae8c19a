"""`secondcast demo`: what it advises can be typed, and an error says whose flags it names."""

import shlex
import sys

import pytest
import typer

from secondcast import cli
from secondcast.commands.demo import _FLAGS, _where
from secondcast.commands.shell.outputs import OutputFolder
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

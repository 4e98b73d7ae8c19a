"""What `train` leaves and says at the end: a report in the run folder, and commands to copy."""

import shlex
import sys

import pytest

from secondcast.api.run_report import RunReport
from secondcast.commands.train.next_steps import next_lines
from secondcast.inspection.report.page import is_of_run
from secondcast.storage_schemas.reader import Cache
from tests.commands.test_cli import secondcast
from tests.project.test_docs import parse
from tests.trainer.conftest import cache_folder, t5_config

__all__ = ["cache_folder", "t5_config"]


@pytest.fixture
def words(tmp_path, cache_folder, dev_teacher, t5_config):
    more = ["--backbone", dev_teacher, "--steps", 2, "--batch-size", 2, "--replay-check", 2, "--checkpoint-every", 1]
    return ["train", tmp_path / "my run", "--cache", cache_folder, "--student", t5_config, *more]


def test_a_run_ends_with_a_report_and_with_commands_of_its_own_paths(
    tmp_path, words, cache_folder, dev_teacher, capsys
):
    code, said, heard = secondcast(*words, capsys=capsys)
    run = tmp_path / "my run"
    assert code == 0 and is_of_run((run / "report.html").read_bytes())
    lowest = [line for line in heard.splitlines() if "validation loss" in line and line.startswith("step ")]
    assert [line.split(",")[0].split(":")[0] for line in lowest] == ["step 1", "step 2"]
    done, head, *commands = said.splitlines()
    assert (done, head) == (f"{run}: student trained for 2 steps", "Next:")
    score, pictures, exporting = (parse(line.strip().partition("| ")[2] or line.strip()) for line in commands)
    assert (score["student"], score["cache"], score["backbone"]) == (run, str(cache_folder), str(dev_teacher))
    assert (pictures["student"], pictures["teacher"], pictures["prompts"]) == (str(run), str(dev_teacher), ["-"])
    assert (exporting["student"], str(exporting["folder"])) == (run, f"{run}-student")
    held_out = next(prompt.text for prompt in Cache.open(cache_folder).prompts if prompt.held_out)
    assert commands[1].startswith(f"  echo '{held_out}' | ")
    code, said, _ = secondcast(*shlex.split(commands[2])[1:], capsys=capsys)
    assert code == 0 and said.startswith(f"{run}-student: ")


def test_quiet_hides_validations_and_advice(words, capsys):
    code, said, heard = secondcast(*words, "--quiet", capsys=capsys)
    assert (code, said, heard) == (0, f"{words[1]}: student trained for 2 steps\n", "")


def test_a_report_of_something_else_in_the_run_folder_is_kept(words, capsys):
    assert secondcast(*words, capsys=capsys)[0] == 0
    said: list[str] = []
    file, observer = words[1] / "report.html", RunReport(said.append)
    before = file.read_bytes()
    observer.on_checkpoint(words[1], 2)
    assert is_of_run(file.read_bytes()) and len(file.read_bytes()) == len(before) and said == []
    file.write_text("mine")
    for _ in range(2):
        observer.on_checkpoint(words[1], 2)
    assert file.read_text() == "mine"
    assert said == [f"{file} is not a report of this run and is kept: move it, and the next checkpoint writes one"]


def test_a_student_of_the_pocket_is_scored_on_its_world(cache_folder, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["secondcast", "train"])
    lines = next_lines(tmp_path / "run", {"cache": Cache.open(cache_folder)}, backbone="pocket")
    assert lines[1] == f"  secondcast evaluate score {tmp_path}/run --pocket"

"""`secondcast check` from the command line: rows that are kept, machines that are compared, wrong input in one line."""

import json
import os
import subprocess
import sys
import time

import pytest

from secondcast.check import check as checking
from secondcast.check import machine
from secondcast.check.check import empty_results
from secondcast.check.results import RESULTS_FILE, CheckRow, read_results
from tests.check.conftest import pocket
from tests.commands.test_cli import secondcast

ROWS = (
    CheckRow(name="pipeline", claim="c", result="holds", detail="bit for bit"),
    CheckRow(name="train: plain", claim="c", result="measured", step_seconds=0.2, matrix_rate_fraction=0.25),
    CheckRow(
        name="picture: student", claim="c", result="measured", picture_seconds=2.0, text_seconds=0.01,
        peak_bytes=2**30, reserved_bytes=2**31, planned_bytes=3 * 2**29,
    ),
)  # fmt: skip


@pytest.fixture
def quick(monkeypatch):
    """Rows without their work."""
    rows = list(ROWS)
    monkeypatch.setattr(
        checking.Check,
        "_parts",
        lambda self, progress: [
            checking._Part(names=(row.name,), make=lambda row=row: [row], seconds=0.0, replays=False) for row in rows
        ],
    )
    return rows


def test_rows_are_printed_saved_and_taken_up(tmp_path, capsys, quick):
    code, said, errors = secondcast("check", tmp_path / "c", capsys=capsys)
    assert (code, errors) == (0, "")
    first, second, third, last = said.splitlines()
    assert first.split() == ["holds", "pipeline", "bit", "for", "bit"]
    assert second.endswith("200 ms per step; 25% of the matrix rate")
    assert third.endswith("2.00 s, 10 ms of them for the text; 1.00 GiB allocated, planned 1.50, 2.00 reserved")
    assert last == f"{tmp_path / 'c'}: 1 hold, 0 broken, 2 measured, 0 not run"
    saved = json.loads((tmp_path / "c" / "check.json").read_text())
    assert [row["name"] for row in saved["rows"]] == [row.name for row in ROWS]
    _, again, _ = secondcast("check", tmp_path / "c", capsys=capsys)
    assert (
        again.splitlines()[0] == f"{tmp_path / 'c'}: 3 rows kept from an earlier call" and len(again.splitlines()) == 2
    )


def test_a_broken_row_is_named_and_the_exit_code_is_1(tmp_path, capsys, quick):
    quick[0] = ROWS[0].model_copy(update={"result": "broken"})
    code, said, _ = secondcast("check", tmp_path / "c", capsys=capsys)
    assert code == 1 and said.splitlines()[-1].endswith("1 broken, 2 measured, 0 not run; broken: pipeline")


def test_json_is_the_saved_file(tmp_path, capsys, quick):
    _, said, _ = secondcast("check", tmp_path / "c", "--json", capsys=capsys)
    assert json.loads(said) == json.loads((tmp_path / "c" / "check.json").read_text())


def test_the_check_of_another_machine_is_not_taken_up(tmp_path, capsys, quick, monkeypatch):
    secondcast("check", tmp_path / "c", capsys=capsys)
    here = empty_results(pocket()).machine.diffusers
    monkeypatch.setattr(machine, "version", lambda name: "1.0")
    code, _, errors = secondcast("check", tmp_path / "c", capsys=capsys)
    assert code == 1
    assert f"has the check of another machine or environment (diffusers is 1.0, was {here}): give another" in errors


def test_results_are_merged_side_by_side_with_empty_cells(tmp_path, capsys):
    results = empty_results(pocket())
    ours, theirs = results, results.model_copy(update={"teacher": "random-flux"})
    for row in ROWS:
        ours = ours.with_row(row)
    (tmp_path / "a.json").write_bytes(ours.encoded())
    (tmp_path / "b.json").write_bytes(theirs.with_row(ROWS[0]).encoded())
    code, said, _ = secondcast("check", "--merge", tmp_path / "a.json", tmp_path / "b.json", capsys=capsys)
    assert code == 0
    device = results.machine.device
    lines = said.splitlines()
    assert lines[3] == f"| check | pocket, {device} | random-flux, {device} |"
    assert lines[5:7] == [
        "| pipeline | holds: bit for bit | holds: bit for bit |",
        "| train: plain | measured: 200 ms per step; 25% of the matrix rate |  |",
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--merge"], "--merge without files, expected one or more check.json of earlier checks"),
        (["--merge", "missing.json"], "missing.json cannot be read (No such file or directory), expected a check.json"),
        (["a", "b"], "2 folders are given, expected one: result files need --merge"),
        (["c", "--teacher", "random-qwen"], "random-qwen"),
    ],
)
def test_wrong_input_is_one_line(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, _, errors = secondcast("check", *words, capsys=capsys)
    assert code == 1 and message in errors and len(errors.splitlines()) == 1


def test_a_file_that_is_no_result_is_refused_by_the_field(tmp_path, capsys):
    (tmp_path / "x.json").write_text('{"format": "secondcast-check"}')
    code, _, errors = secondcast("check", "--merge", tmp_path / "x.json", capsys=capsys)
    assert code == 1 and "x.json is not a result of `secondcast check` (version is missing)" in errors


@pytest.mark.slow
def test_a_killed_check_is_taken_up(tmp_path):
    command = [sys.executable, "-P", "-m", "secondcast.cli", "check", str(tmp_path / "c"), "--device", "cpu"]
    file = tmp_path / "c" / RESULTS_FILE
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None and (not file.is_file() or len(read_results(file).rows) < 8):
        time.sleep(0.1)
    process.kill()
    process.wait()
    before = read_results(file)
    assert 8 <= len(before.rows) < 20
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    after = read_results(file)
    assert after.rows[: len(before.rows)] == before.rows and after.broken == ()
    assert after.row("picture: large").result == "measured"


def test_cublas_is_deterministic_before_the_first_product(tmp_path, capsys, quick, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = []

    def rate(*arguments, **named):
        before.append(os.environ.get("CUBLAS_WORKSPACE_CONFIG"))
        return 1.0

    monkeypatch.setattr(machine, "matrix_rate", rate)
    secondcast("check", tmp_path / "c", capsys=capsys)
    assert before == [":4096:8"]


def test_the_check_of_another_version_is_not_taken_up(tmp_path, capsys, quick, monkeypatch):
    monkeypatch.setattr("secondcast.__version__", "9.8")
    secondcast("check", tmp_path / "c", capsys=capsys)
    monkeypatch.setattr("secondcast.__version__", "9.9")
    code, _, errors = secondcast("check", tmp_path / "c", capsys=capsys)
    assert code == 1 and "has the check of version 9.8, this is 9.9: give another folder" in errors

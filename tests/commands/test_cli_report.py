"""`secondcast inspect report`: a file written whole or not at all, and a line that says what is in it."""

import re

import pytest

from tests.commands.test_cli import secondcast
from tests.evaluation.conftest import recorded, student, t5_config
from tests.storage_schemas.caches import write_cache

__all__ = ["recorded", "student", "t5_config"]


STRIPS = "expected a number of trajectories such as 64, 0 for none, or all"


@pytest.fixture
def cache(tmp_path):
    write_cache(tmp_path / "c")
    return tmp_path / "c"


@pytest.mark.thorough
def test_one_file_holds_cache_strips_and_student(tmp_path, recorded, student, dev_teacher, capsys):
    words = ["--teacher", dev_teacher, "--student", student, "--out", tmp_path / "new/r.html", "--batch-size", 4]
    words += ["--closed-loop", 0, "--num-frames", 1, "--num-strips", 2, "--device", "cpu"]
    code, said, heard = secondcast("inspect", "report", recorded, *words, capsys=capsys)
    assert code == 0, heard
    page = (tmp_path / "new/r.html").read_text()
    assert page.count("data:image/webp;base64,") >= 2 and "a red dog" in page
    holds = "12 trajectories, norms of 12, 2 film strips, files intact, s on 8 held-out trajectories"
    assert re.fullmatch(rf"{tmp_path}/new/r.html: [\d.]+ KiB, {holds}\n", said)
    assert "film strips of 2 of 12 trajectories: the 1 hardest and 1 at random (seed 0)" in heard


def test_quiet_says_what_was_written_alone(tmp_path, cache, capsys):
    out = tmp_path / "r.html"
    code, said, heard = secondcast(
        "inspect", "report", cache, "--out", out, "--quiet", "--no-verify-checksums", capsys=capsys
    )
    assert code == 0 and said.count("\n") == 1 and "files not checked" in said
    assert "film strips:" not in heard and "norms:" not in heard


@pytest.mark.parametrize(
    ("words", "message", "code"),
    [
        (
            ["--num-strips", "some"],
            f"--num-strips is 'some', {STRIPS}",
            1,
        ),
        (["--num-strips", "-1"], f"--num-strips is '-1', {STRIPS}", 1),
        (
            ["--student", "no-run"],
            "no student no-run: there is no such folder; give a run folder, or what `secondcast export` wrote",
            1,
        ),
        (["--evaluation", "no.json"], "no file no.json: expected the output of `secondcast evaluate score --out`", 1),
        (["--teacher", "/nowhere/at/all"], "/nowhere/at/all", 1),
        (["--frame-size", "4"], "--frame-size", 1),
    ],
)
def test_what_does_not_fit_is_one_line_and_leaves_the_report_of_before(tmp_path, cache, capsys, words, message, code):
    out = tmp_path / "r.html"
    out.write_text("of before")
    words = ["--out", out, "--overwrite", *words]
    found, said, heard = secondcast("inspect", "report", cache, *words, capsys=capsys)
    assert (found, said) == (code, "") and message in heard
    assert heard.startswith("secondcast: ") and heard.count("\n") == 1
    assert out.read_text() == "of before" and {path.name for path in tmp_path.iterdir()} == {"c", "r.html"}


def test_a_place_where_no_file_can_be_is_told_before_the_work(tmp_path, cache, capsys):
    (tmp_path / "file").write_text("")
    for out in (tmp_path, tmp_path / "file/r.html"):
        code, _, heard = secondcast("inspect", "report", cache, "--out", out, capsys=capsys)
        assert code == 1 and re.fullmatch(rf"secondcast: {out} cannot be written \(.*\): give another --out\n", heard)


def test_nothing_is_written_among_the_files_of_the_cache(tmp_path, cache, monkeypatch, capsys):
    monkeypatch.chdir(cache)
    for command in ("report", "images", "compare"):
        more = ["--student", "any"] if command == "compare" else []
        code, _, heard = secondcast("inspect", command, ".", "--out", "r.png", *more, capsys=capsys)
        assert code == 1 and heard == (
            "secondcast: --out r.png is inside the cache ., where `secondcast inspect verify` would report it as "
            "foreign: give a path outside it\n"
        )
    assert not (cache / "r.png").exists()


def test_a_folder_that_is_no_cache_is_one_line(tmp_path, capsys):
    code, _, heard = secondcast("inspect", "report", tmp_path, "--out", tmp_path / "r.html", capsys=capsys)
    assert code == 1 and "has no manifest.json: it is not a cache" in heard and heard.count("\n") == 1
    assert not (tmp_path / "r.html").exists()


@pytest.mark.thorough
def test_a_report_replaces_one_of_the_same_cache_and_no_other_file(tmp_path, cache, monkeypatch, capsys):
    write_cache(tmp_path / "other")
    out = tmp_path / "r.html"
    words = ["inspect", "report", "--out", out, "--quiet", "--no-verify-checksums"]
    assert secondcast(*words, cache, capsys=capsys)[0] == 0
    first = out.read_bytes()
    monkeypatch.chdir(tmp_path)
    assert secondcast(*words, "c", capsys=capsys)[0] == 0
    for foreign, of in ((out.read_bytes(), "other"), (b"<title>mine</title>", "c"), (b"\xff" * 10, "c"), (b"", "c")):
        out.write_bytes(foreign)
        code, said, heard = secondcast(*words, of, capsys=capsys)
        assert (code, said) == (1, "") and out.read_bytes() == foreign
        assert (
            heard == f"secondcast: {out} exists and would be lost: give another --out, or --overwrite to replace it\n"
        )
    assert secondcast(*words, "c", "--overwrite", capsys=capsys)[0] == 0
    assert len(out.read_bytes()) > 10 and str(tmp_path).encode() not in first[:4096]

"""What commands print reaches any terminal: every encoding of stdout, no escape sequence of a prompt, one place."""

import ast
import io
import json
import os
import pty
import shlex
import subprocess
import sys
import unicodedata

import pytest

from secondcast import cli
from secondcast.commands.shell.console import PlainTable, print_line, print_table
from tests.project.test_imports import ROOT, sources

# Escape sequences as 7 and 8 bits, an override of the text's direction, and what cp1252 does not have.
NASTY = ("a red \x1b[31mcircle\x1b[0m", "a sign with the word '中文' \u202e on it", "a blue square 😀 \x9b2J é")
ENCODINGS = ["ascii", "cp1252", "latin-1", "utf-8"]


def printed(words, encoding, monkeypatch) -> tuple[int, str, str]:
    """Run the command line with streams of an encoding; exit code, stdout, stderr."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True) for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    monkeypatch.setattr(sys, "argv", ["secondcast", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out, err = (stream.buffer.getvalue().decode(encoding) for stream in streams)
    monkeypatch.undo()
    return stop.value.code, out, err


def assert_harmless(text: str) -> None:
    found = {c for c in text if unicodedata.category(c) == "Cc" or c in "\u202a\u202b\u202d\u202e\u2066\u2067\u2068"}
    assert found <= {"\n"}, found


@pytest.fixture(scope="module")
def nasty_prompts(tmp_path_factory):
    file = tmp_path_factory.mktemp("prompts") / "nasty.json"
    file.write_text(json.dumps(NASTY))
    return file


@pytest.fixture(scope="module")
def nasty_cache(tmp_path_factory, nasty_prompts):
    cache = tmp_path_factory.mktemp("cache") / "c"
    with pytest.MonkeyPatch.context() as patch:
        words = ["build", cache, "--teacher", "pocket", "--prompts", nasty_prompts, "--steps", "2", "--quiet"]
        assert printed(words, "ascii", patch)[0] == 0
    return cache


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("words", [["list"], ["count"], ["count", "--teacher", "pocket"]], ids=" ".join)
def test_prompts_are_printed_in_any_encoding_and_obeyed_by_no_terminal(words, encoding, nasty_prompts, monkeypatch):
    code, out, err = printed(["prompts", *words, nasty_prompts], encoding, monkeypatch)
    assert (code, err) == (0, "")
    assert_harmless(out)
    if words == ["list"]:
        assert out.splitlines()[0] == r"a red \x1b[31mcircle\x1b[0m"
        assert ("é" in out) == (encoding != "ascii") and ("中文" in out) == (encoding == "utf-8")
    if "pocket" in words:
        assert r"\x1b[31m" in out.replace(r"\\", "\\")


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_json_has_the_same_values_in_any_encoding(encoding, nasty_prompts, monkeypatch):
    code, out, _ = printed(["prompts", "list", nasty_prompts, "--json"], encoding, monkeypatch)
    assert code == 0 and tuple(row["text"] for row in json.loads(out)) == NASTY
    assert_harmless(out)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize(
    "words",
    [["summary"], ["show", "0"], ["show", "2"], ["show", "--grep", "a"], ["show", "--grep", "a", "--json"],
     ["show", "0", "--json"], ["show", "--prompt", NASTY[1]], ["verify"]],
    ids=lambda words: " ".join(words[:2]).encode("ascii", "replace").decode(),
)  # fmt: skip
def test_a_cache_is_shown_in_any_encoding(words, encoding, nasty_cache, monkeypatch):
    code, out, err = printed(["inspect", words[0], nasty_cache, *words[1:]], encoding, monkeypatch)
    assert code == 0, err
    assert_harmless(out + err)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["inspect", "summary", "c\x1b[31mé"], r"c\x1b[31m"),
        (["prompts", "list", "p\x9b2J中.txt"], r"p\x9b2J"),
        (["plan", "build", "--teacher", "\x1b]0;title\x07", "--num-prompts", "3"], r"\x1b]0;title\x07"),
        (["build", "c", "--\x1b[31mflag"], r"--\x1b[31mflag"),
        (["\x1b[31mfoo"], r"\x1b[31mfoo"),
        (["evaluate", "images", "f\x1b[31m"], r"f\x1b[31m"),
    ],
)
def test_an_error_line_is_harmless_and_whole_in_any_encoding(words, said, encoding, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("a dog\n")
    code, out, err = printed(words, encoding, monkeypatch)
    assert code in (1, 2) and out == "" and said in err.replace("\\\\", "\\")
    assert err.count("\n") == 1 and err.startswith("secondcast: ")
    assert_harmless(err)


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_students_are_trained_compared_and_scored_in_any_encoding(encoding, nasty_cache, tmp_path, monkeypatch):
    nasty = nasty_cache.parent / "p.json"
    nasty.write_text(json.dumps(NASTY))
    run, student = tmp_path / "run[/red] 中", tmp_path / "s"
    words = ["train", run, "--cache", nasty_cache, "--student", "pocket-tiny", "--steps", "1", "--batch-size", "2"]
    for line in (
        [*words, "--loss", "embedding"],
        ["export", run, student],
        ["generate", student, "--teacher", "pocket", "--prompts", nasty, "--out", tmp_path / "g", "--steps", "1"],
        ["inspect", "compare", nasty_cache, "0", "1", "--student", run, "--out", tmp_path / "c.png"],
        ["inspect", "images", nasty_cache, "--out", tmp_path / "i.png", "--num-frames", "1"],
        ["evaluate", "table", run, "--pocket", "--num-prompts", "1", "--steps", "1", "--no-quantized-baseline"],
        ["evaluate", "score", run, "--pocket", "--num-prompts", "1", "--steps", "1"],
    ):
        code, out, err = printed(line, encoding, monkeypatch)
        assert code == 0, err
        assert_harmless(out + err)


QUIET = """
import sys
from secondcast import cli
def run(*words):
    sys.argv = ["secondcast", *words, "--quiet"]
    try:
        cli.main()
    except SystemExit as stop:
        assert stop.code == 0, words
build = ["--teacher", "pocket", "--prompts", "p.txt"]
run("build", "c", *build, "--steps", "1")
run("build", "c", *build, "--steps", "1", "--workers", "1")
run("train", "r", "--cache", "c", "--student", "pocket-tiny", "--steps", "1", "--batch-size", "2",
    "--replay-check", "2")
run("export", "r", "s")
run("generate", "s", *build, "--out", "g", "--steps", "1")
run("inspect", "images", "c", "0", "--out", "strips.png")
run("inspect", "verify", "c", "--resample", "1")
"""


@pytest.mark.slow
def test_quiet_commands_print_their_results_and_nothing_of_the_libraries(tmp_path):
    (tmp_path / "p.txt").write_text("a red circle\na blue square\na green ring\n")
    done = subprocess.run([sys.executable, "-c", QUIET], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].startswith("c: 3 trajectories of 3 prompts, ") and lines[1] == lines[0]
    assert lines[2:4] == ["r: student trained for 1 step", lines[3]] and lines[3].startswith("s: float32 weights, ")
    assert lines[4:6] == ["g: 3 pictures", "1 film strip in strips.png"]
    assert lines[-1].startswith("1 of 1 recomputed bit for bit") and len(lines) == 9


@pytest.mark.thorough
def test_a_terminal_gets_no_sequence_of_a_prompt(nasty_prompts):
    controller, terminal = pty.openpty()
    command = [sys.executable, "-c", "from secondcast import cli; cli.main()", "prompts", "list", str(nasty_prompts)]
    environment = {**os.environ, "TERM": "xterm", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.Popen(command, stdout=terminal, stderr=terminal, env=environment, cwd=ROOT)
    assert done.wait() == 0
    os.close(terminal)
    out = os.read(controller, 100_000).decode()
    os.close(controller)
    assert out.splitlines()[0] == r"a red \x1b[31mcircle\x1b[0m" and "中文" in out
    assert_harmless(out.replace("\r\n", "\n"))


def test_names_that_look_like_markup_are_printed_as_they_are(capsys):
    table = PlainTable("[bold]head", "n")
    table.add_row("[/red] run\x1b[1m", "1\n2")
    print_table(table)
    print_line("[/red] :dog:")
    out = capsys.readouterr().out
    assert "[bold]head" in out and r"[/red] run\x1b[1m" in out and out.endswith("[/red] :dog:\n")


@pytest.mark.thorough
def test_a_reader_that_stops_early_is_no_error(tmp_path):
    (tmp_path / "many.txt").write_text("".join(f"prompt {number}\n" for number in range(20_000)))
    command = [
        sys.executable,
        "-c",
        "from secondcast import cli; cli.main()",
        "prompts",
        "list",
        str(tmp_path / "many.txt"),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout.readline() == "prompt 0\n"
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    process.wait()


@pytest.mark.thorough
@pytest.mark.parametrize("closed", ["1", "2"])
def test_a_process_without_stdout_or_stderr_does_its_work(closed, tmp_path):
    (tmp_path / "p.txt").write_text("a dog\n")
    program = f"{shlex.quote(sys.executable)} -c 'from secondcast import cli; cli.main()'"
    line = f"{program} prompts pocket out.txt --num-prompts 3 {closed}>&- && {program} prompts list no.txt {closed}>&-"
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and len((tmp_path / "out.txt").read_text().splitlines()) == 3
    said = ["3 captions in out.txt\n", "secondcast: no prompt file no.txt"]
    assert (done.stdout, done.stderr[:33]) == (("", said[1]) if closed == "1" else (said[0], ""))


@pytest.mark.thorough
def test_the_traceback_of_a_bug_is_harmless_too():
    body = "def app(**_): raise RuntimeError('of \\x1b[31mred \\ud83d')"
    code = f"from secondcast import cli\n{body}\ncli.app = app\ncli.main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    lines = done.stderr.splitlines()
    assert done.returncode == 1 and lines[0] == "Traceback (most recent call last):"
    assert lines[-1] == r"RuntimeError: of \x1b[31mred \ud83d"


def test_answers_are_printed_by_one_module_and_progress_by_another():
    for file in [*sources("commands"), *sources("api"), *sources("cli")]:
        if file in (ROOT / "commands/shell/console.py", ROOT / "api/terminal.py"):
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in ("print", "typer.echo", "Console", "sys.stdout.write"), file
            if isinstance(node, ast.ImportFrom):
                assert node.module not in ("rich.console", "rich.table"), file

"""Help, versions, completion, progress: what every command has in common."""

import json
import os
import pty
import re
import select
import shlex
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from secondcast import __version__, cli
from secondcast.commands.shell import versions
from secondcast.commands.shell.resuming import GO_ON, GO_ON_WITH, goes_on, interrupted_text, out_of_memory_text
from tests.commands.test_cli import ROOT, secondcast
from tests.project.test_docs import parse

RUN = "import sys; sys.argv[0] = 'secondcast'; from secondcast import cli; cli.main()"
# Seconds whatever they are given, or nothing to show while they read one file.
SHORT = {
    "plan build", "plan train", "plan generate", "plan evaluate", "plan recipe", "prompts list", "prompts count",
    "prompts compbench", "prompts commontext", "prompts pocket", "inspect summary", "inspect show", "inspect diff",
}  # fmt: skip


def leaves(command: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """All commands by name."""
    if not hasattr(command, "commands"):
        yield " ".join(words), command
    for name, inner in getattr(command, "commands", {}).items():
        yield from leaves(inner, (*words, name))


COMMANDS = dict(leaves(typer.main.get_command(cli.app)))
EXAMPLES = [
    (name, " ".join(text.split()))
    for name, command in COMMANDS.items()
    for text in re.findall(r"Example: ((?:.+\n?)+)", command.help or "")
]


def environment(**more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "TERM")}
    return kept | {"OMP_NUM_THREADS": "1", "TERM": "xterm-256color"} | more


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_says_what_it_and_each_of_its_flags_does_and_has_an_example_of_its_own(name):
    command = COMMANDS[name]
    assert [parameter.name for parameter in command.params if not getattr(parameter, "help", None)] == []
    assert [line for owner, line in EXAMPLES if owner == name and line.startswith(f"secondcast {name}")]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_at_80_columns_shows_whole_names(name, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    rare = any(parameter.name == "help_all" for parameter in COMMANDS[name].params)
    said = secondcast(*name.split(), "--help-all" if rare else "--help", capsys=capsys)[1]
    assert max(map(len, said.splitlines())) <= 80
    for parameter in COMMANDS[name].params:
        for flag in (*parameter.opts, *parameter.secondary_opts):
            assert parameter.param_type_name == "argument" or re.search(rf"(?<![\w-]){flag}(?![\w-])", said), flag


@pytest.mark.parametrize(("name", "line"), EXAMPLES, ids=[line[11:60] for _, line in EXAMPLES])
def test_an_example_is_a_line_that_the_program_takes(name, line):
    assert parse(line).keys() == {parameter.name for parameter in COMMANDS[name].params} - {"help"}


def test_what_may_take_long_can_be_told_to_be_quiet():
    loud = {name for name, command in COMMANDS.items() if not any("--quiet" in p.opts for p in command.params)}
    assert loud == SHORT


@pytest.fixture(scope="module")
def named_things(tmp_path_factory):
    """A folder with what the examples name: my-cache, prompts.txt and their like."""
    folder = tmp_path_factory.mktemp("examples")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        Path("prompts.txt").write_text("".join(f"a red circle and {n} blue squares\n" for n in range(1, 15)))
        Path("color_train.txt").write_text("a red dog\na green cat\n")
        Path("notes.csv").write_text("caption\na brown hat\n")
        Path("CommonText_Train.json").write_text(json.dumps(["a sign that says hello"]))
        from secondcast.pocket import TEACHER_FOLDER
        from tests.cache_builder.building import build_cache

        for name, seed in (("my-cache", 0), ("other-cache", 1)):
            build_cache(folder / name, TEACHER_FOLDER, folder / "color_train.txt", steps=2, seed=seed)
        yield folder


RUNNABLE = (
    "plan build", "plan train", "plan generate", "prompts list", "prompts count", "prompts commontext",
    "prompts pocket", "inspect summary", "inspect diff", "inspect verify", "convert", "subset", "build",
)  # fmt: skip
# What is made smaller, so that it takes no more than a second.
LESS = {
    "prompts commontext": ["--num-prompts", "50"],
    "prompts pocket": ["--num-prompts", "64"],
    "build": ["--limit", "2", "--steps", "1"],
}


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("name", "line"),
    [(name, line) for name, line in EXAMPLES if name in RUNNABLE],
    ids=[name for name, _ in EXAMPLES if name in RUNNABLE],
)
def test_an_example_runs_where_the_things_that_it_names_exist(name, line, named_things, tmp_path, monkeypatch, capsys):
    if name == "prompts commontext":
        pytest.importorskip("wordfreq")
    for thing in named_things.iterdir():
        (tmp_path / thing.name).symlink_to(thing)
    if name in ("build", "prompts pocket"):
        # They make what the others find.
        (tmp_path / ("my-cache" if name == "build" else "prompts.txt")).unlink()
    monkeypatch.chdir(tmp_path)
    line = line.replace("--resample 4", "--resample 1")
    code, said, heard = secondcast(*shlex.split(line)[1:], *LESS.get(name, []), capsys=capsys)
    assert code == 0 and said.strip(), heard
    assert not set("\r\x1b") & set(said + heard)


def test_the_versions_of_libraries_stand_in_one_column_and_what_is_missing_is_said(monkeypatch, capsys):
    found = versions._version
    monkeypatch.setattr(versions, "_version", lambda name: None if name in ("zarr", "torchao") else found(name))
    code, said, _ = secondcast("--version", capsys=capsys)
    lines = dict(line.split(maxsplit=1) for line in said.splitlines())
    assert code == 0 and lines["secondcast"] == __version__ and lines["torch"].startswith("2.")
    assert lines["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}.")
    assert lines["zarr"] == "not installed" and "torchao" not in lines
    assert found("a-library-that-nobody-has") is None


def test_every_optional_library_has_its_version_told():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    needed = {re.match(r"[\w-]+", line)[0] for name, lines in extras.items() if name != "dev" for line in lines}
    assert needed <= set(versions.OPTIONAL)


SEVERAL = """
import contextlib, io, json, os, sys
sys.path.insert(0, {root!r})
from secondcast import cli
found = []
for words, more in json.loads(sys.argv[1]):
    os.environ.update(more)
    sys.argv = ["secondcast", *words]
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.suppress(SystemExit):
        cli.main()
    found.append(said.getvalue())
print(json.dumps([found, sorted({{"torch", "transformers", "diffusers", "zarr"}} & sys.modules.keys())]))
"""


def said_by(*lines: tuple[list[str], dict[str, str]]) -> list[str]:
    """What command lines print, each with its environment; none of them may import a heavy library."""
    code = SEVERAL.format(root=str(ROOT))
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(lines)], env=environment(), capture_output=True, text=True, check=True
    )
    said, heavy = json.loads(done.stdout)
    assert heavy == [] and done.stderr == ""
    return said


COMPLETED = {
    "secondcast inspect ": {"summary", "show", "diff", "images", "verify"},
    "secondcast build --compression ": {"none", "lossless", "int8"},
    "secondcast convert a b --for": {"--format"},
    "secondcast plan build --gpu h1": {"h100-sxm"},
    "secondcast build c --teacher ": {"pocket", "black-forest-labs/FLUX.1-dev"},
    "secondcast train r --student pock": {"pocket-small", "pocket-tiny"},
}


@pytest.mark.thorough
def test_completion_offers_commands_flags_and_values_and_imports_nothing_heavy():
    how = {"_SECONDCAST_COMPLETE": "complete_bash"}
    typed = [([], {**how, "COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}) for line in COMPLETED]
    for line, said in zip(COMPLETED, said_by(*typed), strict=True):
        assert COMPLETED[line] <= set(said.split()), line


@pytest.mark.thorough
def test_what_only_prints_imports_nothing_heavy():
    shell = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    lines = [["--help"], ["--version"], ["build", "--help"], ["--show-completion", "bash"]]
    said = said_by(*((words, shell) for words in lines))
    assert [len(text) > 100 for text in said] == [True] * 4 and "complete -o default" in said[3]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["bild"], "No such command 'bild'. Did you mean 'build'? (see secondcast --help)"),
        (
            ["inspect", "sumary", "c"],
            "No such command 'sumary'. Did you mean 'summary'? (see secondcast inspect --help",
        ),
        (
            ["build", "c", "--teachr", "x"],
            "No such option: --teachr. Did you mean --teacher? (see secondcast build --help",
        ),
        (["subset", "a", "b", "--num-prompts", "many"], "--num-prompts is 'many', expected an integer (see "),
        (
            ["build", "c", "--compression", "zip"],
            "--compression: 'zip' is not one of 'none', 'lossless'",
        ),
    ],
)
def test_what_is_misspelt_is_one_line_with_what_was_meant(words, message, capsys):
    code, said, heard = secondcast(*words, capsys=capsys)
    assert (code, said, heard.count("\n")) == (2, "", 1) and heard.startswith(f"secondcast: {message}"), heard


def test_a_group_without_a_command_shows_its_help(capsys):
    code, said, heard = secondcast("inspect", capsys=capsys)
    assert (code, said) == (2, "") and heard.startswith("Usage: secondcast inspect ") and "\n  verify " in heard


def test_commands_that_go_on_are_told_from_those_that_begin_anew():
    assert COMMANDS.keys() > GO_ON | GO_ON_WITH.keys()
    table = ["secondcast", "evaluate", "table", "a=run", "--pocket"]
    assert goes_on("evaluate table", [*table, "--out=results"]) and not goes_on("evaluate table", table)
    assert goes_on("export", ["secondcast", "export", "x", "--push", "a/b"]) and not goes_on("export", ["x", "y"])
    assert not goes_on("evaluate score", ["secondcast", "evaluate", "score", "run", "--out", "x.json"])
    assert goes_on("train", []) and not goes_on("plan build", []) and not goes_on("", [])
    assert out_of_memory_text(False, ["--device"]) == "the GPU is out of memory: use --device cpu"
    assert out_of_memory_text(False, ["--max-gpu-memory"]).endswith("of memory: give --max-gpu-memory auto")
    assert out_of_memory_text(True, ["--device", "--batch-size"]) == (
        "the GPU is out of memory: lower --batch-size or use --device cpu; committed work is kept"
    )


def interrupted(words: list[str], wait_for: str, folder: Path) -> tuple[int, str]:
    """Start a command, send Ctrl-C once it has said something, and give its exit code and its last line."""
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, *words], cwd=folder, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
        env=environment(), text=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    for line in process.stderr:
        if wait_for in line:
            process.send_signal(signal.SIGINT)
            break
    heard = process.stderr.read()
    return process.wait(), heard.strip().splitlines()[-1]


@pytest.mark.slow
def test_ctrl_c_says_of_a_command_that_keeps_nothing_that_it_begins_anew(tmp_path, named_things):
    # Of one that keeps what it finished: tests/commands/test_cli.py. The teacher is loaded after the files are
    # compared.
    words = ["inspect", "verify", str(named_things / "my-cache"), "--resample", "2"]
    code, last = interrupted(words, "verify: ", tmp_path)
    assert code == 130 and last == f"secondcast: {interrupted_text(False)}"


def test_a_signal_while_it_is_said_that_a_command_was_interrupted_makes_no_traceback(monkeypatch, capsys):
    def again(goes_on: bool) -> str:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        return interrupted_text(goes_on)

    def ctrl_c(**options: Any) -> None:
        raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(cli, "app", ctrl_c)
    monkeypatch.setattr(cli, "_resumes", lambda: True)
    monkeypatch.setattr(cli, "interrupted_text", again)
    try:
        with pytest.raises(SystemExit) as ended:
            cli.main()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert ended.value.code == 130
    assert capsys.readouterr().err == f"secondcast: {interrupted_text(True)}\n"


def test_ctrl_c_while_the_commands_are_imported_ends_without_a_word(tmp_path):
    (tmp_path / "typer.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nimport nothing\n")
    run = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]; from secondcast import cli"
    process = subprocess.Popen(
        [sys.executable, "-c", run], stderr=subprocess.PIPE, env=environment(),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert process.communicate()[1] == b"" and process.returncode == -signal.SIGINT


BARS = """
import sys, time
sys.path.insert(0, {root!r})
from secondcast.api.terminal import Terminal
with Terminal().bar("sample", total=4, done=0, unit="trajectories") as bar:
    bar.advance(2, "a note")
    print("an answer")
    sys.stdout.flush()
    {then}
"""


def in_a_terminal(code: str, *, interrupt_after: str | None = None, **more: str) -> tuple[str, str]:
    """Run Python with a terminal of 80 columns as its stderr and a pipe as its stdout; what came out of both."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=theirs, stdin=theirs, text=True,
        env=environment(COLUMNS="80", **more), preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    os.close(theirs)
    shown = b""
    while process.poll() is None or select.select([ours], [], [], 0)[0]:
        if select.select([ours], [], [], 0.05)[0]:
            try:
                shown += os.read(ours, 65536)
            except OSError:
                break
        if interrupt_after is not None and interrupt_after.encode() in shown:
            process.send_signal(signal.SIGINT)
            interrupt_after = None
    said = process.communicate()[0]
    os.close(ours)
    return shown.decode(), said


def test_a_terminal_shows_a_bar_and_answers_go_to_stdout():
    shown, said = in_a_terminal(BARS.format(root=str(ROOT), then="pass"))
    assert re.search(r"sample .*━.*2/4\S* trajectories .*left .*a note", shown)
    assert "\x1b[?25h" in shown and "an answer" not in shown
    assert said == "an answer\n"


def test_no_color_gives_a_bar_without_colours():
    shown, _ = in_a_terminal(BARS.format(root=str(ROOT), then="pass"), NO_COLOR="1")
    assert "2/4 trajectories" in re.sub(r"\x1b\[\d*m", "", shown) and not re.search(
        r"\x1b\[[\d;]*3[1-7][;m]|\x1b\[38;", shown
    )


def test_a_terminal_that_cannot_move_its_cursor_gets_lines():
    shown, _ = in_a_terminal(BARS.format(root=str(ROOT), then="pass"), TERM="dumb")
    assert shown.startswith("sample: 2 of 4 trajectories, ") and "\x1b" not in shown


def test_ctrl_c_leaves_a_visible_cursor_and_a_clean_line():
    said = "sys.excepthook = lambda *_: sys.stderr.write('stopped'); time.sleep(60)"
    shown, _ = in_a_terminal(BARS.format(root=str(ROOT), then=said), interrupt_after="a note")
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")
    assert shown.replace("\x1b[?25h", "").endswith("\r\nstopped")


def test_a_pipe_gets_lines_without_control_characters_even_where_colours_are_forced():
    done = subprocess.run(
        [sys.executable, "-c", BARS.format(root=str(ROOT), then="pass")],
        env=environment(FORCE_COLOR="1"), capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout == "an answer\n"
    assert re.fullmatch(r"sample: 2 of 4 trajectories, \d+\.\d\d/s, 0 s, 0 s left, a note\n", done.stderr)

"""What README.md and docs/building.md tell a user to type is a command line that the program takes."""

import re
import shlex
import shutil
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import typer

from secondcast import cli
from secondcast.cache_builder.prompts.sources import PromptSource
from secondcast.check.results import read_results
from secondcast.check.table import merged_table

ROOT = Path(__file__).resolve().parents[2]
PAGES = (
    ROOT / "README.md",
    ROOT / "docs/building.md",
    ROOT / "docs/training.md",
    ROOT / "docs/small-gpus.md",
    ROOT / "docs/inspecting.md",
    ROOT / "docs/evaluation.md",
    ROOT / "docs/checking.md",
    ROOT / "docs/sharing.md",
    ROOT / "integrations/comfyui/README.md",
)
LINKING = (
    *sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), ROOT / "storage_schemas/README.md",
    ROOT / "integrations/comfyui/README.md",
)  # fmt: skip
FENCE = re.compile(r"^```\w*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)|`((?:docs|storage_schemas|pocket|models|benchmarks|integrations)/[\w./-]+)`")


def command_lines(text: str) -> list[str]:
    """The command lines of `secondcast` in the fenced blocks of a page; what starts several of them left out."""
    lines = [line for block in FENCE.findall(text) for line in re.sub(r"\\\n\s*", " ", block).splitlines()]
    shown = [re.sub(r"^(?:srun|torchrun .* --no-python|ray job submit .* --) ", "", line) for line in lines]
    return [line for line in shown if line.startswith("secondcast ")]


def parse(line: str) -> dict[str, Any]:
    """The values of a command line as its command gets them; raises what it would say. Three spaces: a remark."""
    words = shlex.split(re.split(r"\s{3,}", line)[0], comments=True)[1:]
    command: Any = typer.main.get_command(cli.app)
    while hasattr(command, "commands"):
        name = words.pop(0)
        assert name in command.commands, f"{line}: no command {name!r}"
        command = command.commands[name]
    return command.make_context(command.name, words, resilient_parsing=False).params


LINES = [(page, line) for page in PAGES for line in command_lines(page.read_text())]


@pytest.fixture
def _named_settings(tmp_path, monkeypatch):
    """The settings file of docs/building.md at the name that its commands give it."""
    monkeypatch.chdir(tmp_path)
    text = next(block for block in FENCE.findall(PAGES[1].read_text()) if block.startswith("# flux.toml"))
    assert tomllib.loads(text)["batch-size"]
    Path("flux.toml").write_text(text)
    (recipe,) = (block for block in FENCE.findall(PAGES[2].read_text()) if "[[train.stage]]" in block)
    Path("my-recipe.toml").write_text(recipe)
    shutil.copytree(ROOT / "recipes", "recipes")


@pytest.mark.thorough
@pytest.mark.usefixtures("_named_settings")
@pytest.mark.parametrize(("page", "line"), LINES, ids=[f"{page.name}: {line[:60]}" for page, line in LINES])
def test_a_documented_command_line_is_one_that_the_program_takes(page, line):
    values = parse(line)
    for source in values.get("prompts") or ():
        assert PromptSource.of(source).path
    worker = re.sub(r"\$\w+", "0", values.get("worker") or "")
    assert re.fullmatch(r"(\d+/\d+)?", worker), line


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("secondcast build c --teacher pocket --prompts p.txt --shards 3", "--shards"),
        ("secondcast build c --teacher pocket --prompts p.txt --compression zip", "'zip' is not one of"),
        ("secondcast build c --teacher pocket", "--prompts"),
        ("secondcast inspect verify", "CACHE"),
        ("secondcast inspect verify a b", "unexpected extra argument"),
    ],
)
def test_a_wrong_command_line_would_be_found(line, message):
    # typer carries its own copy of click from 0.29 on: the class of its errors is known by what they can do.
    with pytest.raises(Exception) as caught:
        parse(line)
    assert message in caught.value.format_message()


def test_there_are_command_lines_of_every_stage_of_a_build():
    lines = " ".join(line for _, line in LINES)
    assert all(word in lines for word in ("--pilot", "--workers", "--worker ", "--ray", "--stage text", "--extend"))


@pytest.mark.parametrize("page", LINKING, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_links_to_is_there(page):
    for link, path in LINK.findall(page.read_text()):
        if "://" not in link:
            assert (page.parent / link if link else ROOT / path).exists(), f"{page.name} names {link or path}"


@pytest.mark.skipif(version("typer") < "0.29", reason="older versions of typer show choices in other brackets")
def test_the_page_of_options_is_what_the_commands_take():
    from docs import options

    assert options.FILE.read_text(encoding="utf-8") == options.page(), "write it again: python -m docs.options"


def test_the_table_of_families_is_what_they_state():
    from docs import families

    assert families.FILE.read_text(encoding="utf-8") == families.page(), "write it again: python -m docs.families"


def test_the_table_of_checks_is_made_of_their_files():
    page = (ROOT / "docs/benchmarks.md").read_text()
    table = page.split("<!-- check -->\n")[1].split("<!-- /check -->")[0].strip()
    files = sorted((ROOT / "docs/checks").glob("*.json"))
    assert files and table == merged_table([read_results(file) for file in files])

"""What the recipes that come along tell a user to type is what the program takes, and plans."""

import re
import shlex
from pathlib import Path

import pytest

from secondcast.pocket import world
from secondcast.trainer.recipe import read_recipe
from tests.commands.test_cli import secondcast
from tests.project.test_docs import parse

RECIPES = sorted((Path(__file__).resolve().parents[3] / "recipes").glob("*.toml"))


def told_commands(file: Path) -> list[str]:
    """The command lines in the remarks of a recipe, those in a loop of the shell too."""
    remarks = re.sub(r"\\\n#\s*", " ", file.read_text())
    return [
        re.sub(r"\$\{?kind\}?", "sign", line.strip()) for line in re.findall(r"(?m)^# {5,}(secondcast .*)$", remarks)
    ]


LINES = [(file, line) for file in RECIPES for line in told_commands(file)]


@pytest.mark.parametrize(("file", "line"), LINES, ids=[f"{file.name}: {line[:50]}" for file, line in LINES])
def test_a_command_line_in_a_recipe_is_one_that_the_program_takes(file, line, monkeypatch):
    monkeypatch.chdir(file.parents[1])
    values = parse(line)
    assert {values.get("recipe"), values.get("config")} <= {None, Path("recipes") / file.name}


def test_each_recipe_says_how_it_is_run():
    assert {file for file, line in LINES if shlex.split(line)[1] == "train"} == set(RECIPES)


def test_captions_of_one_kind_make_a_cache_of_one_kind(tmp_path, capsys):
    code, said, _ = secondcast(
        "prompts", "pocket", tmp_path / "s.txt", "--kind", "sign", "--num-prompts", 40, capsys=capsys
    )
    assert code == 0 and said == f"40 captions in {tmp_path}/s.txt\n"
    assert all(isinstance(world.parse(line), world.Sign) for line in (tmp_path / "s.txt").read_text().splitlines())


def test_the_recipe_in_the_documentation_is_one(tmp_path):
    page = (RECIPES[0].parents[1] / "docs/training.md").read_text()
    (block,) = re.findall(r"^```toml\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    (tmp_path / "my-recipe.toml").write_text(block)
    recipe = read_recipe(tmp_path / "my-recipe.toml")
    assert recipe.caches == {"scenes": "scenes-cache", "signs": "signs-cache"}
    assert [stage.name for stage in recipe.settings.stages] == ["pretrain", "replay"]

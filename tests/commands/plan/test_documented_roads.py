"""Hours and money in README.md and docs/families.md are what `plan recipe` prints for the documented commands."""

import json
import re
from pathlib import Path

import pytest

from tests.commands.test_cli import secondcast

ROOT = Path(__file__).resolve().parents[3]
README = (ROOT / "README.md").read_text()
FAMILIES = (ROOT / "docs/families.md").read_text()
COMMANDS = re.findall(r"^secondcast (plan recipe recipes/.*)$", README, re.MULTILINE)
TOTAL = re.compile(r"(?P<hours>[\d.,]+) h in all .*, about (?P<usd>[\d.,]+) USD")
NO_INITIAL = (r"(?ms)^\[init-student\]\n.*?(?=^\[train\])", "")
CHANGES = {
    "stabilityai/stable-diffusion-3-medium-diffusers": [],
    "PixArt-alpha/PixArt-Sigma-XL-2-512-MS": [NO_INITIAL, ('"initial-base"', '"google/t5-v1_1-base"')],
    "black-forest-labs/FLUX.2-klein-4B": [
        NO_INITIAL, ('"initial-base"', '"Qwen/Qwen3-0.6B"'), (r"(resolution = \d+)", r"\1\nsteps = 4")
    ],
}  # fmt: skip
IN_README = dict(zip(CHANGES, ("Stable Diffusion 3 medium", "PixArt-Sigma (512 px)", "FLUX.2-klein 4B"), strict=True))


def planned(words: list[object], capsys) -> tuple[str, str, dict]:
    """Hours and USD as the verdict prints them, and the facts of both phases."""
    code, said, heard = secondcast(*words, "--json", capsys=capsys)
    assert (code, heard) == (0, "")
    both = json.loads(said)["both_phases"]
    total = TOTAL.search(both["verdict"])
    assert total, both["verdict"]
    return total["hours"], total["usd"], both


def row(page: str, name: str) -> list[str]:
    """The cells of the table row that names something."""
    (line,) = (line for line in page.splitlines() if line.startswith("| ") and name in line)
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.thorough
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.split()[2])
def test_the_readme_has_the_hours_and_the_money_of_its_recipes(command, capsys):
    recipe = command.split()[2]
    words = [str(ROOT / word) if word == recipe else word for word in command.split()]
    hours, usd, both = planned(words, capsys)
    *_, hours_cell, usd_cell = row(README, f"({recipe})")
    assert (hours_cell.split()[0], usd_cell) == (hours, usd)
    assert both["fits"] is (recipe != "recipes/paper.toml")


@pytest.mark.thorough
@pytest.mark.parametrize("teacher", CHANGES)
def test_the_pages_have_the_hours_and_the_money_of_other_families(teacher, tmp_path, capsys):
    recipe = (ROOT / "recipes/flux-h100-day.toml").read_text().replace("black-forest-labs/FLUX.1-dev", teacher)
    for pattern, replacement in CHANGES[teacher]:
        recipe = re.sub(pattern, replacement, recipe)
    (tmp_path / "my-recipe.toml").write_text(recipe)
    (command,) = re.findall(r"^secondcast (plan recipe my-recipe.toml .*)$", FAMILIES, re.MULTILINE)
    words = [str(tmp_path / word) if word == "my-recipe.toml" else word for word in command.split()]
    hours, usd, both = planned(words, capsys)
    assert both["fits"] is True
    assert row(README, f"| {IN_README[teacher]}")[-2:] == [hours, usd]
    assert row(FAMILIES, f"| `{teacher}` |")[2:4] == [hours, usd]


def test_every_road_of_the_readme_has_its_command():
    linked = set(re.findall(r"\((recipes/[\w-]+\.toml)\)", README))
    assert linked == {command.split()[2] for command in COMMANDS}

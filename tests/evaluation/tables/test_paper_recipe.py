"""Recipes of tables: errors name the table and the key; those that come along can be read."""

import re
import tomllib
from pathlib import Path

import pytest

from secondcast.evaluation.tables.paper.recipe import read_recipe
from secondcast.storage_schemas.errors import SettingsError
from tests.evaluation.tables.test_paper import RECIPE

ROOT = Path(__file__).resolve().parents[3]


def refused(tmp_path, text: str) -> str:
    file = tmp_path / "table.toml"
    file.write_text(text)
    with pytest.raises(SettingsError) as caught:
        read_recipe(file)
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix(f"{file}")


def test_a_wrong_recipe_is_refused_by_table_and_key(tmp_path):
    assert refused(tmp_path, "[rows.a]\nstudent = 'a'\n").startswith(
        " has no [prompts.NAME], expected tables [prompts."
    )
    assert refused(tmp_path, "generate = 3\n" + RECIPE[RECIPE.index("[prompts.") :]).startswith(
        " has generate = 3, exp"
    )
    assert refused(tmp_path, RECIPE + "[other]\n").startswith(" has 'other', expected tables [prompts.NAME] and ")
    assert refused(tmp_path, RECIPE.replace("steps = 1", "stesp = 1")).startswith(", [rows.quick]: stesp")
    assert refused(tmp_path, RECIPE.replace("steps = 1", "samples-per-prompt = 2")) == (
        ", [rows.quick]: settings: samples-per-prompt is a key of [prompts.NAME], not of a row: move it"
    )
    assert refused(tmp_path, RECIPE.replace('["pocket"]', '["beauty"]')).startswith(", [prompts.captions]: metrics.0")
    assert refused(tmp_path, RECIPE.replace('reference = "teacher"', "")).startswith(
        ", [prompts.twice]: settings: expected fid in metrics and reference"
    )
    assert refused(tmp_path, RECIPE.replace('reference = "teacher"', 'reference = "nix"')) == (
        ", [prompts.twice]: reference is 'nix', expected a row (teacher, 8 bit, tiny, small, quick) or a folder of "
        "images"
    )


@pytest.mark.parametrize("file", sorted((ROOT / "recipes/tables").glob("*.toml")), ids=lambda file: file.stem)
def test_the_tables_that_come_along_are_recipes(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reference-images").mkdir()
    recipe = read_recipe(file)
    assert "teacher" in recipe.rows
    if file.stem == "ablation":
        trained = {
            re.search(r"secondcast train (\S+)", other.read_text())[1] for other in ROOT.glob("recipes/abl*.toml")
        }
        assert {row.student for row in recipe.rows.values()} - {"teacher"} == trained
    assert tomllib.loads(file.read_text()).keys() <= {"generate", "metrics", "prompts", "rows"}

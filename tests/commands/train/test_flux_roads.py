"""The recipes for FLUX on one card, run by the commands that they state, on the pocket and at small sizes."""

import json
import re
from pathlib import Path

import pytest

from secondcast.pocket import world
from secondcast.trainer.recipe import read_recipe
from tests.commands.test_cli import secondcast

RECIPES = Path(__file__).resolve().parents[3] / "recipes"
ROADS = ("flux-h100-day", "flux-24gb", "flux-12gb", "flux-8gb")


def in_miniature(text: str, folder: Path) -> str:
    """A recipe with other sizes and places: teacher, pixels, student, steps, batch."""
    for pattern, replacement in (
        (r"black-forest-labs/FLUX\.1-dev", "pocket"),
        (r"resolution = 256", "resolution = 16\nsteps = 2"),
        (r"resolution = 512", "resolution = 24\nsteps = 2"),
        (r'"(captions|signs)\.txt"', rf'"{folder}/\1.txt"'),
        (r"limit = .*", "limit = 6"),
        (r'size = "base"', 'size = "1x16"'),
        (r'"(initial-base|flux-\w+)"$', rf'"{folder}/\1"'),
        (r"batch-size = \d+", "batch-size = 16"),
        (r"grad-accum-steps = \d+", "grad-accum-steps = 2"),
        (r"^(steps = [\d_]{4,}|budget-share = .*)$", "steps = 1"),
        (r"gpu-blocks = 12", "gpu-blocks = 2"),
    ):
        text = re.sub(pattern, replacement, text, flags=re.MULTILINE)
    return text


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.thorough if name == ROADS[0] else pytest.mark.slow) for name in ROADS]
)
def test_the_road_of_a_card_is_gone_to_its_end_on_the_pocket(tmp_path, capsys, name):
    recipe = tmp_path / "r.toml"
    recipe.write_text(in_miniature((RECIPES / f"{name}.toml").read_text(), tmp_path))
    for kind in ("captions", "signs"):
        lines = world.captions(60, seed=len(kind), split="train")
        (tmp_path / f"{kind}.txt").write_text("\n".join(lines))

    def done(*words: object) -> str:
        code, said, heard = secondcast(*words, capsys=capsys)
        assert code == 0, heard
        return said

    for cache in ("flux-text", "flux-256", "flux-512"):
        done("build", tmp_path / cache, "--config", f"{recipe}:{cache}", "--quiet")
    done("init-student", tmp_path / "initial-base", "--config", recipe, "--quiet")
    assert "trained for 3 steps" in done("train", tmp_path / "run", "--config", recipe, "--replay-check", 1, "--quiet")
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    stages = [line for line in lines if "kind" in line]
    assert [line["stage"] for line in stages] == ["pretrain", "vision-256", "vision-512"]
    assert [("weighted_context_loss" in line) for line in stages] == [False, True, True]


def test_the_roads_differ_in_lengths_and_memory_alone():
    budget = {"time_budget_seconds": 3600.0}
    found = [read_recipe(RECIPES / f"{name}.toml", **({} if name == ROADS[0] else budget)) for name in ROADS]
    varied = {"steps", "budget_share", "grad_accum_steps"}
    stages = {tuple(stage.model_dump_json(exclude=varied) for stage in one.settings.stages) for one in found}
    assert len(stages) == 1 and len({tuple(one.caches.items()) for one in found}) == 1
    assert all([stage.name for stage in one.settings.stages][-1] == "vision-512" for one in found)

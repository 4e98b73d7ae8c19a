"""What a person is shown of a sensitivity: which tokens the transformer reads, and in how many directions."""

import json
import math
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_builder.sensitivity import measure
from cache_builder.sensitivity_plan import SensitivitySettings
from cache_builder.workers import Worker
from inspection.mending import mending_command, mending_commands
from inspection.reading import SHADES, sensitivity_facts, shade, shaded
from inspection.show import describe, trajectory_lines
from inspection.summary import summarise
from inspection.summary_text import summary_lines
from models.teacher_folder import REPLAY_PARTS, find_teacher
from storage_schemas.progress import Silent
from storage_schemas.reader import Cache
from storage_schemas.verification import verify
from tests.cache_builder.building import build_cache


@pytest.fixture(scope="module")
def cache(tmp_path_factory, dev_teacher):
    folder = tmp_path_factory.mktemp("read")
    words = [(c, t, s) for c in ("red", "green", "blue") for t in ("dog", "cat", "car") for s in ("left", "right", "")]
    (folder / "p.txt").write_text("".join(f"a {c} {t} on the {s}\n" for c, t, s in words))
    build_cache(folder / "cache", dev_teacher, folder / "p.txt", shard_size=27, batch_size=9)
    asked = SensitivitySettings(products=1, prompts=22, steps=1)
    measure(
        Cache.open(folder / "cache"), find_teacher(str(dev_teacher), REPLAY_PARTS), asked,
        device=torch.device("cpu"), progress=Silent(), worker=Worker(),
    )  # fmt: skip
    return Cache.open(folder / "cache")


@settings(max_examples=60)
@given(weight=st.floats(0, 1e4), more=st.floats(0, 1e4))
def test_a_heavier_token_is_never_shaded_lighter(weight, more):
    assert SHADES.index(shade(weight)) <= SHADES.index(shade(weight + more))


def test_shades_are_threes_of_the_mean():
    assert [shade(w) for w in (0.0, 0.3, 0.34, 0.9, 1.1, 2.9, 3.1, 8.9, 9.1, 1e6)] == [*"··░░▒▒▓▓██"]
    assert shaded(["a", "dog"], [0.1, 20.0]) == "·a █dog"


def test_show_tells_what_is_read_in_a_prompt_and_whether_it_was_measured_there(cache):
    sampled = set(json.loads((cache.folder.path / "sensitivity/record.json").read_text())["plan"]["prompt_ids"])
    for index, how in (
        (_index(cache, sampled, True), "measured on this"),
        (_index(cache, sampled, False), "predicted"),
    ):
        facts = describe(cache, index)
        weights = facts["reading"]["weights"]
        assert len(weights) == len(facts["tokens"]) and all(math.isfinite(w) and w >= 0 for w in weights)
        (line,) = [line for line in trajectory_lines(facts, "cache") if line.strip().startswith("read")]
        assert shaded(facts["tokens"], weights) in line and how in line


def _index(cache, sampled, wanted):
    places = (cache.layout.place(int(index)).prompt for index in cache.indices())
    return next(at for at, prompt in enumerate(places) if (cache.prompts[prompt].id in sampled) == wanted)


def test_summary_tells_how_many_directions_matter(cache):
    facts = summarise(cache)
    assert facts["sensitivity"]["prompts"] == 22 and facts["sensitivity"]["steps"] == 1
    assert 1 < facts["sensitivity"]["effective_rank"] < 24
    assert sum(facts["sensitivity"]["spectrum"]) == pytest.approx(1, rel=1e-4)
    line = dict(summary_lines(facts))["sensitivity"]
    assert line.startswith("measured on 22 prompts x 1 products x 1 steps; ") and "of 24 directions matter" in line


def test_a_cache_that_was_not_measured_says_nothing_of_it(tmp_path, dev_teacher, prompt_file):
    build_cache(tmp_path / "cache", dev_teacher, prompt_file)
    cache = Cache.open(tmp_path / "cache")
    assert sensitivity_facts(cache) is None and describe(cache, 0)["reading"] is None
    assert "sensitivity" not in dict(summary_lines(summarise(cache)))
    assert not any(line.strip().startswith("read ") for line in trajectory_lines(describe(cache, 0), "cache"))


def test_a_damaged_measurement_hides_nothing_else(tmp_path, cache):
    folder = shutil.copytree(cache.folder.path, tmp_path / "cache")
    (folder / "sensitivity/record.json").write_text("{")
    opened = Cache.open(folder)
    facts = describe(opened, 0)
    assert facts["reading"].keys() == {"problem"} and facts["steps"]
    (said,) = [line for line in trajectory_lines(facts, "cache") if line.strip().startswith("read")]
    assert "sensitivity/record.json is not as it was written" in said
    (problem,) = (report := verify(folder, Silent())).problems
    again = f"understudy sensitivity {folder} --anew"
    assert (
        mending_commands(str(folder), report, None) == [again] == [mending_command(str(folder), problem, report, None)]
    )
    line = dict(summary_lines(summarise(opened)))["sensitivity"]
    assert line.startswith(f"{folder}/sensitivity/record.json is not as it was written (")

"""The roads to the pocket teacher are command lines, and their costs are those of FLUX."""

from dataclasses import asdict
from itertools import pairwise

import pytest

from experiments.pocket_harness import as_flags
from experiments.roads.arms import (
    BATCH_SIZE,
    RATIOS,
    RECORDED,
    TEXT,
    VISION_TFLOP,
    Road,
    late,
    roads,
    sizes,
    start_of_late,
)
from experiments.roads.tables import THRESHOLDS, VISION_STEP_TFLOP, print_tables
from secondcast.pocket.scorer import DIMENSIONS
from secondcast.trainer.settings import TrainFlags
from tests.project.test_docs import parse

EVERY = [*roads(1.0), *sizes(1.0), *late(1.0)]


def road(name: str) -> Road:
    return next(one for one in EVERY if one.name.startswith(name))


@pytest.mark.slow
def test_every_road_is_a_command_line_that_trains_what_it_says():
    for one in EVERY:
        flags = one.flags("pocket-base", seed=1)
        (stage,) = TrainFlags.from_flags(**flags).settings().stages
        assert (stage.loss, stage.length, stage.batch_size) == (one.loss, one.steps, BATCH_SIZE)
        assert bool(stage.context_loss_weight) == one.mixed
        taken = parse(f"secondcast train r --cache c {' '.join(as_flags(flags))}")
        assert {key: taken[key] for key in flags} == flags


def test_roads_have_names_of_their_own():
    assert len({one.name for one in EVERY}) == len(EVERY)


def test_checkpoints_on_the_series_are_kept_and_the_last_one_is_measured():
    for one in EVERY:
        measured = one.measured()
        assert measured[-1] == one.steps and all(number % one.every == 0 for number in measured)
        assert all(after == 2 * before for before, after in pairwise(measured))


def test_steps_cost_what_they_cost_of_flux():
    vision, depth, context = (road(f"roads-teacher-{name}") for name in ("vision-1024", "depth-1024", "context-20480"))
    assert vision.training_tflop(1) == pytest.approx(BATCH_SIZE * VISION_TFLOP)
    assert vision.training_tflop(1) / depth.training_tflop(1) == pytest.approx(RATIOS["depth"])
    assert context.training_tflop(580) == pytest.approx(vision.training_tflop(1))
    mixed = road("late-late-vision-mixed-1024")
    assert mixed.training_tflop(580) == pytest.approx(581 * vision.training_tflop(1))


def test_only_the_context_loss_is_spared_the_trajectories():
    # 1,024 trajectories and texts, and the 2,000 texts of the initial student.
    assert road("roads-random-vision-1024").data_tflop() == pytest.approx(1024 * 301.71)
    assert road("roads-random-context-20480").data_tflop() == pytest.approx(20480 * 0.71)
    assert road("roads-teacher-context-1024").data_tflop() == pytest.approx(3024 * 0.71)
    for one in EVERY:
        assert one.prompts in (TEXT if one.loss == "context" else (RECORDED,))
        assert (f"text-{TEXT[-1]}" in one.caches) >= one.mixed


def test_late_roads_begin_where_a_context_road_ends():
    start = start_of_late(1.0)
    assert (start.initial, start.loss, start.prompts) == ("teacher", "context", TEXT[-1])
    assert {one.initial for one in late(1.0)} == {"late"}


def test_the_tables_come_from_results(capsys):
    references = {name: _result(name, 0, 0.98) for name in ("teacher", "teacher-initial", "untrained")}
    references["untrained"]["vision_loss"] = 6.0
    runs = [_run(one, seed) for one in EVERY for seed in range(2)]
    print_tables(references, runs)
    lines = capsys.readouterr().out.splitlines()
    assert "### Roads: vision loss at equal steps" in lines and "### Sizes" in lines
    # At the first measured checkpoint the loss is .4, then half of that each time; the initial student has .1 already.
    teacher, random = road("roads-teacher-context-20480"), road("roads-random-context-20480")
    needed = [
        one.training_tflop(40 * 2**at) / VISION_STEP_TFLOP for one, at in ((teacher, 3), (random, 2), (random, 3))
    ]
    assert THRESHOLDS[:2] == (0.1, 0.05)
    cells = ("0", f"{needed[0]:.2g}", "", f"{22480 * 0.71 / 628:.0f}", "no")
    assert f"| teacher, context, lr 0.001 | 20480 | 2 | {' | '.join(cells)} |" in lines
    cells = (f"{needed[1]:.2g}", f"{needed[2]:.2g}", "", f"{20480 * 0.71 / 628:.0f}", "no")
    assert f"| random, context, lr 0.003 | 20480 | 2 | {' | '.join(cells)} |" in lines
    assert any(line.startswith("| 10k | 80,000 |") for line in lines)


def _run(one: Road, seed: int) -> dict:
    curve = [{"steps": steps, "vision_loss": 0.4 / 2**at} for at, steps in enumerate(one.measured())]
    return _result(one.name, seed, 0.97) | {"road": asdict(one), "curve": curve}


def _result(name: str, seed: int, mean: float) -> dict:
    scores = {dimension: {"mean": mean, "count": 70} for dimension in DIMENSIONS}
    told = {"name": name, "seed": seed, "mean": mean, "scores": scores, "parameters": 80_000}
    return told | {"vision_loss": 0.1, "training_seconds": 1.0}

"""The arms of the experiment on the pocket teacher are what its tables say of them."""

import pytest

from experiments.pocket_harness import as_flags
from experiments.training.arms import (
    BATCH_SIZE,
    STEP_KINDS,
    Arm,
    Budget,
    best_warmups,
    finalists,
    main_arms,
    replay_arms,
)
from experiments.training.tables import QUESTIONS, print_tables
from secondcast.pocket.scorer import DIMENSIONS
from secondcast.trainer.settings import TrainFlags
from tests.project.test_docs import parse

BUDGET = Budget(
    steps=500,
    seconds=80.0,
    step_seconds=dict(zip(STEP_KINDS, (0.026, 0.028, 0.27, 0.27, 0.26, 0.25), strict=True)),
)


def every_arm(warmup: str = "context") -> list[Arm]:
    return main_arms(BUDGET) + replay_arms(BUDGET, {"steps": warmup, "time": warmup})


def arms_of(budget: str) -> list[Arm]:
    return [arm for arm in every_arm() if arm.budget == budget]


@pytest.mark.slow
@pytest.mark.parametrize("warmup", ["embedding", "context"])
def test_every_arm_is_a_command_line_that_trains_what_it_says(warmup):
    for arm in every_arm(warmup):
        flags = arm.flags("pocket-small", seed=1)
        settings = TrainFlags.from_flags(**flags).settings()
        assert settings.stages[0].loss == (arm.warmup or arm.loss) and settings.stages[-1].loss == arm.loss
        assert settings.total_steps == arm.steps + arm.pretrain_steps
        taken = parse(f"secondcast train r --cache c {' '.join(as_flags(flags))}")
        assert {key: taken[key] for key in flags} == flags


def test_arms_have_names_of_their_own():
    names = [arm.name for arm in every_arm()]
    assert len(set(names)) == len(names)


def test_arms_at_equal_steps_have_equal_steps_and_rows():
    assert {arm.steps + arm.pretrain_steps for arm in arms_of("steps")} == {500}
    assert {arm.flags("s", 0)["batch_size"] % arm.share for arm in every_arm()} == {0}
    assert {arm.flags("s", 0)["batch_size"] for arm in every_arm()} == {BATCH_SIZE}


def test_arms_at_equal_time_have_equal_calibrated_time():
    for arm in arms_of("time"):
        assert arm.seconds(BUDGET.step_seconds) == pytest.approx(80.0, rel=0.02), arm.name


def test_order_and_steps_per_trajectory_change_nothing_else():
    for kind in ("steps", "time"):
        arms = arms_of(kind)
        short = next(arm for arm in arms if arm.family == "short" and arm.warmup == "context")
        for arm in arms:
            if arm.family in {"sequential", "share4", "share20"}:
                assert arm.warmup == "context"
                assert kind == "time" or (arm.pretrain_steps, arm.steps) == (short.pretrain_steps, short.steps)


def test_finalists_are_the_best_of_each_family_and_the_rival_of_the_continued_one():
    arms = every_arm("embedding")
    means = {arm.name: 0.5 + 0.1 * (arm.learning_rate == 1e-3) + 0.2 * (arm.warmup == "context") for arm in arms}
    chosen = finalists(arms, means)
    assert best_warmups(arms, means) == {"steps": "context", "time": "context"}
    assert len(chosen) == 9 + 8 + 1 and {arm.learning_rate for arm in chosen} == {1e-3}
    assert [(arm.family, arm.warmup) for arm in chosen[-1:]] == [("long", "embedding")]
    assert {arm.family for arm in arms} == {family for families in QUESTIONS.values() for family in families}


def test_the_tables_pool_the_seeds(capsys):
    arms = every_arm()
    chosen = finalists(arms, dict.fromkeys([arm.name for arm in arms], 0.5))
    results = [_result(arm.name, seed) | {"arm": {}} for arm in chosen for seed in range(3)]
    print_tables(BUDGET, arms, chosen, [*results, _result("teacher", 0)])
    lines = capsys.readouterr().out.splitlines()
    assert "### Steps per trajectory, equal time: 80 s, 3 seeds" in lines
    naive = next(line for line in lines if line.startswith("| naive, lr 0.001 | 500 |"))
    assert ".95 (.87-.98)" in naive and ".95 [.94, .96]" in naive and " 81 [80, 82] " in naive


def _result(name: str, seed: int) -> dict:
    mean = 0.94 + 0.01 * seed
    errors = dict.fromkeys(("vision_loss", "embedding_error", "context_error"), 0.1)
    scores = {dimension: {"mean": mean, "count": 70} for dimension in DIMENSIONS}
    return {"name": name, "seed": seed, "mean": mean, "scores": scores, "training_seconds": 80 + seed, **errors}

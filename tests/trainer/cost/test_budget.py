"""A run that is to take so many hours has the steps that a step's measured seconds say."""

import json
import re

import pytest

from secondcast.storage_schemas.errors import SettingsError
from secondcast.trainer.cost import budget
from secondcast.trainer.cost.budget import measured_seconds, probe_settings, steps_of_shares
from secondcast.trainer.loop import TimedStep
from secondcast.trainer.recipe import seconds_of
from secondcast.trainer.settings import TrainSettings
from secondcast.trainer.stage import Stage
from tests.commands.test_cli import secondcast
from tests.trainer.conftest import cache_folder, t5_config
from tests.trainer.making import make_trainer

__all__ = ["cache_folder", "t5_config"]


@pytest.mark.parametrize(
    ("text", "seconds"), [("72h", 259_200), ("90m", 5400), ("1.5d", 129_600), ("5s", 5), (" 0.5s ", 0.5)]
)
def test_a_time_is_a_number_and_a_unit(text, seconds):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["72", "h", "-1h", "0s", "0.0h", "1e3s", "1 h", "1,5h", "72H", "1h30m", "", "٣h"])
def test_another_text_is_no_time(text):
    with pytest.raises(
        SettingsError, match=re.escape(f"--time-budget is {text!r}, expected a time such as 72h, 90m or 3d")
    ):
        seconds_of(text)


def shared_settings() -> TrainSettings:
    usual = dict(batch_size=2, learning_rate=1e-3)
    stages = (
        Stage(name="pretrain", loss="embedding", budget_share=0.25, **usual),
        Stage(name="between", loss="embedding", steps=3, **usual),
        Stage(name="main", budget_share=0.5, **usual),
    )
    return TrainSettings(student="x", stages=stages, time_budget_seconds=100.0, checkpoint_every=10)


def test_shares_pay_for_steps_and_stages_with_steps_keep_theirs():
    shared = steps_of_shares(shared_settings(), [0.5, 3.0])
    assert [stage.steps for stage in shared.stages] == [50, 3, 16]
    assert [stage.steps for stage in steps_of_shares(shared_settings(), [1000.0, 1000.0]).stages] == [1, 3, 1]


def test_stages_with_a_share_are_probed_and_no_others():
    probe = probe_settings(shared_settings())
    assert [stage.name for stage in probe.stages] == ["pretrain", "main"]
    assert {stage.steps for stage in probe.stages} == {budget._PROBES}


def test_a_step_costs_its_median_and_its_part_of_a_validation(
    tmp_path, cache_folder, dev_teacher, t5_config, monkeypatch
):
    trainer = make_trainer(tmp_path / "probe", cache_folder, dev_teacher, t5_config)
    clock = iter([100.0, 107.0])
    # The first three steps of a stage are slow, and one of the others.
    taken = [90.0, 90.0, 90.0, 1.0, 1.0, 60.0, 1.0, 1.0, 80.0, 80.0, 80.0, 4.0, 4.0, 4.0, 50.0, 4.0]
    monkeypatch.setattr(trainer, "timed_steps", lambda: [TimedStep(loss=0.0, seconds=seconds) for seconds in taken])
    monkeypatch.setattr(trainer, "validate", lambda done: 0.0)
    monkeypatch.setattr(budget.time, "monotonic", lambda: next(clock))
    assert len(trainer.held_out) > 0
    assert measured_seconds(shared_settings(), lambda run, probe: trainer) == [1.7, 4.7]


RECIPE = """
checkpoint-every = 1000
dropout = 0.0
[[stage]]
name = "pretrain"
loss = "embedding"
budget-share = 0.25
batch-size = 2
[[stage]]
name = "main"
budget-share = 0.5
batch-size = 2
"""


@pytest.fixture
def words(tmp_path, cache_folder, dev_teacher, t5_config):
    (tmp_path / "r.toml").write_text(RECIPE)
    words = ["train", tmp_path / "run", "--config", tmp_path / "r.toml", "--cache", cache_folder]
    return [*words, "--student", t5_config, "--backbone", dev_teacher, "--replay-check", 0]


@pytest.mark.thorough
def test_a_budget_becomes_steps_and_a_resumed_run_keeps_them(tmp_path, words, capsys):
    code, said, heard = secondcast(*words, "--time-budget", "1s", capsys=capsys)
    told = re.findall(r"stage ([\w-]+): ([\d,]+) steps of (\S+) s as measured here, (\d+) s\n", heard)
    assert code == 0 and [name for name, *_ in told] == ["pretrain", "main"]
    for (_, steps, each, told_seconds), seconds in zip(told, (0.25, 0.5), strict=True):
        assert float(told_seconds) == pytest.approx(seconds, abs=0.51)
        # The seconds are told with three digits.
        assert abs(int(steps.replace(",", "")) - seconds / float(each)) <= 1 + 0.01 * seconds / float(each)
    stages = json.loads((tmp_path / "run/config.json").read_bytes())["settings"]["stages"]
    steps = [stage["steps"] for stage in stages]
    assert steps == [int(steps.replace(",", "")) for _, steps, *_ in told]
    assert f"trained for {sum(steps):,} steps" in said

    code, said, heard = secondcast(*words, "--time-budget", "1s", capsys=capsys)
    assert code == 0 and f"resuming from step {sum(steps)}" in heard and "as measured here" not in heard
    assert f"trained for {sum(steps):,} steps" in said
    code, said, heard = secondcast(*words, "--time-budget", "2s", capsys=capsys)
    assert code == 1 and heard.strip().splitlines()[-1] == (
        f"secondcast: {tmp_path}/run was started with time-budget-seconds = 1.0, not 2.0: the weights depend on it; "
        "give the original flags, or another folder"
    )


@pytest.mark.parametrize(
    ("recipe", "budget", "message"),
    [
        (RECIPE, None, "stage main has a budget-share, but no time budget is given: give --time-budget, such as 72h"),
        (RECIPE.replace("budget-share", "#").replace("batch", "steps = 2\nbatch"), "5s",
         "time-budget is given, but no stage has a budget-share: set one in a recipe"),
        (RECIPE.replace("0.5", "0.8"), "5s", "the stages share 1.05 of the budget, expected at most 1"),
    ],
)  # fmt: skip
def test_budgets_and_shares_go_together(tmp_path, words, recipe, budget, message, capsys):
    (tmp_path / "r.toml").write_text(recipe)
    more = [] if budget is None else ["--time-budget", budget]
    code, _, heard = secondcast(*words, *more, capsys=capsys)
    assert code == 1 and heard == f"secondcast: {tmp_path}/r.toml: {message}\n"
    assert not (tmp_path / "run").exists()


def test_a_budget_without_a_recipe_is_refused(words, capsys):
    code, _, heard = secondcast(*words[:2], *words[4:], "--time-budget", "5s", capsys=capsys)
    assert code == 1
    assert heard == ("secondcast: --time-budget is 5s without a recipe, whose stages share it; give --steps\n")

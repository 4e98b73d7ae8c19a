"""The paper's experiments in miniature: trials are what the tables say of them, and nothing is done twice."""

from pathlib import Path

import numpy as np
import pytest

from experiments.pocket_experiment_tables import Answers, interval, mean_of, print_all
from experiments.pocket_harness import Job, as_flags, do, keep_asked, result_of, results_below, work_off
from experiments.pocket_questions import LORA, TEACHER, lora_captions, settings
from experiments.pocket_trials import KINDS, LOSSES, METHODS, RATES, SIZES, Plan, best_rows, recipe_text, small_vision
from secondcast.pocket.scorer import DIMENSIONS, score
from secondcast.pocket.world import captions, parse
from secondcast.trainer.recipe import read_recipe
from secondcast.trainer.settings import TrainFlags
from tests.project.test_docs import parse as parse_command

EACH = {size: dict(zip(LOSSES, (0.03, 0.04, 0.25 + 0.05 * at), strict=True)) for at, size in enumerate(SIZES)}
PLAN = Plan(seconds=60.0, own_seconds=600.0, step_seconds=EACH)
CHOSEN = best_rows(PLAN.scaling(), {})
RIVAL = small_vision(CHOSEN)
STAGES = PLAN.stages(RIVAL)
EVERY = [*PLAN.scaling(), *PLAN.equal_steps(CHOSEN), *PLAN.ablation(RIVAL), *STAGES, PLAN.bert()]


@pytest.mark.slow
def test_every_trial_is_a_command_line_that_trains_what_it_says(tmp_path):
    for trial in (trial for trial in EVERY if trial.order is None):
        flags = trial.flags(2, tmp_path / "bert")
        made = TrainFlags.from_flags(**flags).settings()
        assert made.stages[-1].loss == trial.loss and made.total_steps == trial.steps + trial.pretrain_steps
        assert len(made.stages) == 1 or made.stages[0].learning_rate == trial.warmup_rate
        taken = parse_command(f"secondcast train r --cache c {' '.join(as_flags(flags))}")
        assert {key: taken[key] for key in flags} == flags


def test_trials_have_names_of_their_own():
    assert len({trial.name for trial in EVERY}) == len(EVERY)


def test_sizes_and_stages_have_equal_calibrated_time():
    for trial in (*PLAN.scaling(), *STAGES):
        assert trial.seconds(EACH) == pytest.approx(60.0, rel=0.01), trial.name
    assert PLAN.bert().seconds(EACH) == pytest.approx(600.0, rel=0.01)


def test_data_of_one_kind_gets_the_steps_that_all_of_it_gets():
    for rival in (trial for trial in PLAN.scaling() if trial.row == "small-vision"):
        for trial, kind in zip(PLAN.ablation(rival), KINDS, strict=True):
            assert trial.caches == (kind,)
            assert (trial.pretrain_steps, trial.steps) == (rival.pretrain_steps, rival.steps)
            assert (trial.warmup_rate, trial.learning_rate) == (rival.warmup_rate, rival.learning_rate)
        assert {trial.warmup_rate for trial in PLAN.stages(rival)} == {rival.warmup_rate}


def test_sizes_at_equal_steps_have_those_of_the_largest_and_rates_of_their_own():
    largest = {trial.row.removeprefix("base-"): trial for trial in CHOSEN if trial.size == "base"}
    shorter = PLAN.equal_steps(CHOSEN)
    assert [trial.row for trial in shorter] == [f"{size}-{method}" for size in SIZES[:-1] for method in METHODS]
    for trial in shorter:
        rival = largest[trial.row.removeprefix(f"{trial.size}-")]
        assert (trial.pretrain_steps, trial.steps) == (rival.pretrain_steps, rival.steps)
        assert trial.rate == next(one.rate for one in CHOSEN if one.row == trial.row)


def test_the_stages_are_the_papers_and_the_single_one_is_as_long(tmp_path):
    staged, single = (_recipe(tmp_path, trial) for trial in STAGES)
    warmup, first, second, third = staged.stages
    assert (list(first.caches), list(second.caches)) == (["composition"], ["sign"])
    assert [stage.loss for stage in staged.stages] == ["context", "vision", "vision", "vision"]
    assert first.steps / third.steps == pytest.approx(50 / 200, rel=0.1)
    assert second.steps / third.steps == pytest.approx(70 / 200, rel=0.1)
    assert single.total_steps == staged.total_steps and len(single.stages) == 2
    assert single.stages[0] == warmup
    assert single.stages[1].model_copy(update={"steps": third.steps}) == third


def _recipe(folder, trial):
    file = folder / "recipe.toml"
    file.write_text(recipe_text(trial))
    return read_recipe(file, seed=1).settings


def test_the_best_rate_of_each_row_goes_on():
    means = {trial.name: 0.5 + 0.1 * (trial.size == "base" and "0.001" in trial.name) for trial in PLAN.scaling()}
    chosen = best_rows(PLAN.scaling(), means)
    assert [trial.row for trial in chosen] == [f"{size}-{method}" for size in SIZES for method in METHODS]
    assert {trial.rate for trial in chosen if trial.size == "base"} == {RATES["base"][0]}


def test_each_setting_changes_one_thing():
    usual, *others = [setting for setting in settings() if setting.question != LORA]
    for setting in others:
        pairs = [(getattr(setting, name), getattr(usual, name)) for name in ("steps", "guidance", "text_length")]
        assert sum(one != other for one, other in pairs) == 1 and not setting.usual
    assert usual.usual and usual.work == 1


def _fails(place: Path) -> dict:
    raise ValueError("no disk")


def _counts(place: Path, by: int) -> dict:
    (place / "calls").write_text(str(int((place / "calls").read_text() or 0) + by) if by else "0")
    return {"by": by}


def test_a_job_leaves_its_result_when_it_is_through_and_is_not_done_again(tmp_path):
    failing = Job(place=tmp_path / "a", work=_fails)
    with pytest.raises(ValueError, match="no disk"):
        do(failing)
    assert result_of(failing.place) is None
    job = Job(place=tmp_path / "b", work=_counts, arguments=(0,))
    assert do(job) >= 0
    found = result_of(job.place)
    assert found is not None and found["by"] == 0 and found["wall_seconds"] >= 0
    assert results_below(tmp_path) == [found]
    # Would fail in a process of its own: nothing is left to do.
    work_off([Job(place=job.place, work=_fails)], processes=1)


def test_a_folder_goes_on_only_with_what_it_was_begun_with(tmp_path):
    keep_asked(tmp_path, {"seeds": 3})
    keep_asked(tmp_path, {"seeds": 3})
    with pytest.raises(SystemExit) as ended:
        keep_asked(tmp_path, {"seeds": 2})
    assert str(ended.value) == (
        f"{tmp_path} was begun with {{'seeds': 3}}, you asked for {{'seeds': 2}}: give the same, or another folder"
    )


def test_a_recoloured_picture_scores_by_the_new_colour_and_one_as_before_does_not():
    pytest.importorskip("peft")
    from experiments.pocket_lora import NEW, palette
    from secondcast.pocket.lexicon import COLOURS
    from secondcast.pocket.training.pictures import draw

    before = dict(COLOURS)
    for text in ("a red ring", "two red squares", 'a red sign that says "AB"', "a red cross on sand under a noon sky"):
        old = draw(parse(text), 0)
        with palette(scoring=False):
            new = draw(parse(text), 0)
        assert score(old, text)["colour"] == 1 and (new == NEW).all(-1).any()
        with palette(scoring=True):
            assert score(new, text)["colour"] == 1, text
            assert score(old, text)["colour"] == 0, text
    assert before == COLOURS


def test_half_of_the_captions_for_the_lora_have_its_word():
    pytest.importorskip("peft")
    texts = lora_captions(32)
    assert ["red" in text.replace(",", "").split() for text in texts] == [True] * 16 + [False] * 16


def test_the_tiny_bert_knows_every_word_and_its_positions_reach(tmp_path):
    from transformers import AutoTokenizer

    from experiments.training.pocket_bert import POSITIONS, write_bert
    from secondcast.pocket.training.networks import TEXT_LENGTH

    write_bert(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer(captions(400, seed=3, split="train")).input_ids
    assert max(map(len, ids)) <= TEXT_LENGTH <= POSITIONS
    assert not any(tokenizer.unk_token_id in row for row in ids)


def test_equal_scores_differ_by_nothing_and_worse_ones_by_what_they_lack():
    teacher = np.full((1, 40, 2), 0.9)
    students = np.full((3, 40, 2), 0.7)
    students[:, :, 1] = np.nan
    assert mean_of(students) == pytest.approx(0.7)
    assert interval([(1, teacher), (-1, teacher)]) == pytest.approx((0, 0, 0))
    assert interval([(1, students), (-1, teacher)]) == pytest.approx((-0.2, -0.2, -0.2))


def test_the_tables_come_from_results(capsys):
    runs = [_result(trial.name, seed) for trial in EVERY for seed in range(3)]
    questions = [_answer(setting, who) for setting in settings() for who in (TEACHER, "s0", "s1", "s2")]
    references = [{key: value for key, value in _result("teacher", 0).items() if key != "training_seconds"}]
    results = {"runs": runs, "references": references, "questions": questions}
    print_all(PLAN, CHOSEN, results, lora={"steps": 450, "parameters": 192512})
    lines = capsys.readouterr().out.splitlines()
    assert "### Sizes, 3 seeds" in lines
    base = next(line for line in lines if line.startswith("| base-naive | 1,000 | 2000 | 0.001 |"))
    assert ".95 (.87-.98)" in base and ".95 [.94, .96]" in base and base.endswith(" 61 [60, 62] |")
    signs = next(line for line in lines if line.startswith("| signs only, vision |"))
    assert ".94 [.94, .94] | .84 [.84, .84] | .74 [.74, .74] |" in signs
    assert "| CommonText only | 28.95 | 25.62 | 21.20 | 43.41 |" in lines
    many = next(line for line in lines if line.startswith("| 28 | 1.00 | .50 [.50, .50] | -0.500"))
    assert "+0.000 (+0.000 to +0.000)" in many and "1.00, .50" in many
    assert any(line.startswith("| with the word | 1.00, 1.00 | .50, .50 |") for line in lines)


def _result(name: str, seed: int) -> dict:
    mean = 0.94 + 0.01 * seed
    scores = {dimension: {"mean": mean, "count": 70} for dimension in DIMENSIONS}
    kinds = dict(zip(KINDS, (0.94, 0.84, 0.74), strict=True))
    told = {"name": name, "seed": seed, "mean": mean, "scores": scores, "kinds": kinds, "parameters": 1000}
    return told | {"training_seconds": 60 + seed, "vision_loss": 0.1, "embedding_error": 0.1}


def _answer(setting, who: str) -> dict:
    values = [dict.fromkeys(DIMENSIONS, 1.0 if who == TEACHER else 0.5)] * 8
    return {"question": setting.question, "value": setting.value, "who": who, "values": values}


def test_answers_keep_teacher_and_students_apart():
    usual = settings()[0]
    told = Answers([_answer(usual, who) for who in ("s1", TEACHER, "s0")])
    assert told.teacher(usual).shape == (1, 8, len(DIMENSIONS)) and told.students(usual).shape[0] == 2

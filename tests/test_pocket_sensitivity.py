"""The experiment on training by what is read: trials are what its table says, and variations change what they say."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.pocket_harness import RESULT, as_flags, command, make_cache
from benchmarks.pocket_metrics import (
    CHANGES,
    FULL,
    QUARTER,
    QUARTERS,
    RANK,
    Places,
    agreement,
    change,
    measure_quarter,
)
from benchmarks.pocket_sensitivity import CHEAP, LOSSES, METHODS, RATES, SIZES, Experiment, Trial
from benchmarks.pocket_sensitivity_tables import print_all, rank_correlation
from pocket.scorer import DIMENSIONS
from storage_schemas import sensitivity
from storage_schemas.folders import LocalFolder
from storage_schemas.reader import Cache
from tests.test_docs import parse
from trainer.settings import TrainFlags
from trainer.surrogate import Surrogate

EACH = {size: dict(zip(LOSSES, (0.03, 0.04, 0.05, 0.3 + 0.05 * at), strict=True)) for at, size in enumerate(SIZES)}
ASKED = {"count": 40, "captions": 8, "short_steps": 400, "seconds": 55.0, "seeds": 3}


@pytest.fixture
def experiment(tmp_path):
    for size in SIZES:
        for loss in LOSSES:
            _write(tmp_path / "calibration" / f"{size}-{loss}-0", {"step_seconds": EACH[size][loss]})
            _write(tmp_path / "calibration" / f"{size}-{loss}-1", {"step_seconds": 2 * EACH[size][loss]})
    return Experiment(tmp_path, ASKED, jobs=1)


def _write(place: Path, result: dict) -> None:
    place.mkdir(parents=True, exist_ok=True)
    (place / RESULT).write_text(json.dumps(result))


def _result(trial: Trial, seed: int, mean: float) -> dict:
    scores = {dimension: {"mean": mean, "count": 70} for dimension in DIMENSIONS}
    errors = {"vision_loss": 1 - mean, "surrogate": 0.1 * (1 - mean), "context_error": 0.2, "embedding_error": mean}
    named = {"name": trial.name, "seed": seed, "mean": mean, "scores": scores, "training_seconds": 50 + seed}
    return named | {"loss": trial.loss} | errors


@pytest.mark.slow
def test_every_trial_is_a_command_line_that_trains_what_it_says(experiment):
    for trial in (*experiment.screened(), *experiment.chosen()):
        flags = trial.flags(1)
        made = TrainFlags.from_flags(**flags).settings()
        assert made.stages[-1].loss == trial.loss and made.total_steps == trial.steps + trial.warmup_steps
        taken = parse(f"understudy train r --cache c {' '.join(as_flags(flags))}")
        assert {key: taken[key] for key in flags} == flags


def test_trials_have_names_of_their_own(experiment):
    for trials in (experiment.screened(), experiment.chosen()):
        assert len({trial.name for trial in trials}) == len(trials)


def test_finalists_have_equal_calibrated_time_and_the_screened_ones_equal_steps(experiment):
    for trial in experiment.chosen():
        each = EACH[trial.size]
        before = trial.warmup_steps * each[trial.warmup] if trial.warmup else 0.0
        assert before + trial.steps * each[trial.loss] == pytest.approx(55.0, rel=0.02), trial.name
    assert {trial.steps for trial in experiment.screened()} == {400}


def test_the_better_rate_of_a_loss_goes_on_to_its_variations_and_to_vision_after_it(experiment, tmp_path):
    low, high = RATES["small"]
    for trial in experiment.screened():
        if trial.row in CHEAP:
            _write(tmp_path / "runs" / f"{trial.name}-seed0", {"mean": 0.9 if trial.learning_rate == high else 0.8})
    for trial in experiment.rated():
        better = high if trial.loss == "context" else low
        _write(tmp_path / "runs" / f"{trial.name}-seed0", {"mean": 0.9 if trial.learning_rate == better else 0.8})
    assert {t.learning_rate for t in experiment.screened() if t.row in CHANGES} == {high}
    rates = {trial.row: trial.learning_rate for trial in experiment.chosen() if trial.size == "tiny"}
    assert rates == {method: high if "context" in (METHODS[method]) else low for method in METHODS}


def test_weights_are_as_measured_where_a_row_does_not_say_otherwise(experiment):
    for trial in (*experiment.screened(), *experiment.chosen()):
        power = 0.5 if trial.row.startswith("root of the weights") else 0.25 if "quarter power" in trial.row else 1.0
        reads = "sensitivity" in (trial.loss, trial.warmup)
        assert trial.flags(0).get("weight_power") == (power if reads else None), trial.row


def test_ranks_agree_whatever_the_scale():
    assert rank_correlation([1, 2, 3, 4], [1, 10, 100, 1000]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3, 4], [9, 5, 2, 1]) == pytest.approx(-1)


def test_the_tables_come_from_results(experiment, tmp_path, capsys):
    screened, chosen = experiment.screened(), experiment.chosen()
    runs = [_result(trial, 0, 0.5 + 0.01 * at) for at, trial in enumerate(screened)]
    runs += [_result(trial, seed, 0.94 + 0.01 * seed) for trial in chosen for seed in range(3)]
    measured = [{"name": FULL, "seconds": 601.6, "effective_rank": 21.43, "correlation": 0.951}]
    print_all(tmp_path, screened, chosen, runs, measured)
    lines = capsys.readouterr().out.splitlines()
    assert "| full | 602 | 21.4 | 1.000 | 1.000 | 0.95 |" in lines
    tiny = next(line for line in lines if line.startswith("| tiny | context, vision | 0.003 | 1030 + 46 |"))
    assert " .95 [.94, .96] |" in tiny and tiny.endswith(" 51 [50, 52] |")
    assert any(line.startswith("| surrogate | 1.00 | 1.00 |") for line in lines)
    assert any(line.startswith("| embedding error | -0.9") for line in lines)


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    """A folder of the experiment with few prompts and one product each."""
    folder = tmp_path_factory.mktemp("reads")
    make_cache(folder / "cache", 28)
    places = Places(folder=folder)
    command("sensitivity", places.link(FULL), "--device", "cpu", "--products", 1, "--quiet")
    for name, first_step in QUARTERS.items():
        measure_quarter(places.link(name), first_step, products=1)
    return places


def _read(places: Places, name: str) -> sensitivity.Sensitivity:
    found = sensitivity.read(LocalFolder(places.cache(name)))
    assert found is not None
    return found


@pytest.mark.slow
def test_quarters_are_measured_on_steps_of_their_own(recording):
    steps = [_read(recording, name).record.plan.steps for name in QUARTERS]
    assert [step for quarter in steps for step in quarter] == list(range(4 * QUARTER))
    metrics = [_read(recording, name).metric_DD for name in QUARTERS]
    assert not np.allclose(metrics[0], metrics[-1], rtol=0.1)
    cosine, correlation = agreement(recording.folder, next(iter(QUARTERS)))
    assert 0 < cosine < 1 and correlation is not None and 0 < correlation < 1


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CHANGES if name != "measured on scenes"])
def test_a_variation_is_what_its_name_says_and_can_be_trained_with(recording, name):
    change(recording.folder, name)
    full, found = _read(recording, FULL), _read(recording, name)
    assert np.trace(found.metric_DD) == pytest.approx(np.trace(full.metric_DD), rel=1e-4)
    assert found.weights_NT.mean() == pytest.approx(1, rel=1e-4)
    assert np.allclose(found.metric_DD, full.metric_DD) == name.startswith(("metric only", "weights of"))
    if name == "metric only":
        assert (found.weights_NT == 1).all()
    if name.startswith("rank"):
        rest = np.linalg.eigvalsh(found.metric_DD.astype(np.float64))[:-RANK]
        assert np.ptp(rest) < 1e-3 * rest.mean()
    surrogate = Surrogate.read({"c": Cache.open(str(recording.cache(name)))})
    assert np.array_equal(surrogate.metric_DD, found.metric_DD)

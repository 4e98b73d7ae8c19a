"""`--loss sensitivity`: the quadratic form that was measured, and no transformer to compute it."""

import shutil
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from pydantic import ValidationError

from cache_builder.sensitivity import measure
from cache_builder.sensitivity_plan import SensitivitySettings
from cache_builder.workers import Worker
from models.teacher_folder import REPLAY_PARTS, find_teacher
from storage_schemas import sensitivity
from storage_schemas.errors import BadRun, BadSettings
from storage_schemas.progress import Silent
from storage_schemas.reader import Cache
from tests.trainer.making import CPU
from tests.trainer.test_train import run_training
from trainer.feed import EmbeddingBatch
from trainer.losses import Objective
from trainer.settings import TrainFlags
from trainer.stage import Stage
from trainer.surrogate import Surrogate, TokenWeights, _predictor_of, sensitivity_loss


def measured(folder, teacher, **flags):
    settings = SensitivitySettings.from_flags(**{"products": 1, "prompts": 6, "steps": 2, **flags})
    return measure(
        Cache.open(folder), find_teacher(str(teacher), REPLAY_PARTS), settings,
        device=CPU, progress=Silent(), worker=Worker(), anew=True,
    )  # fmt: skip


@pytest.fixture
def cache(tmp_path, cache_folder, dev_teacher):
    folder = shutil.copytree(cache_folder, tmp_path / "cache")
    measured(folder, dev_teacher)
    return folder


@pytest.mark.parametrize(("rank", "metric_floor"), [(6, 0.01), (6, 0.0), (2, 0.01), (2, 0.0)])
def test_the_loss_is_the_quadratic_form_token_by_token(rank, metric_floor):
    generator = torch.Generator().manual_seed(0)
    factor = torch.randn(6, rank, generator=generator)
    metric_DD, weights_BT = factor @ factor.T, torch.rand(2, 3, generator=generator)
    surrogate = Surrogate(metric_DD=metric_DD.numpy(), weights={}, digests={})
    root_DD = surrogate.root_DD(metric_floor, CPU)
    d_BTD = torch.randn(2, 3, 6, generator=generator)
    found = sensitivity_loss(d_BTD, torch.zeros_like(d_BTD), root_DD, weights_BT, floor=0.05)
    floored_DD = metric_DD + metric_floor * metric_DD.diagonal().mean() * torch.eye(6)
    of_token = torch.einsum("btd,de,bte->bt", d_BTD, floored_DD, d_BTD) * (weights_BT + 0.05) / 1.05
    assert float(found) == pytest.approx(float(of_token.sum(1).mean()), rel=1e-5)


def test_it_trains_by_weights_to_a_power_and_judges_by_those_that_were_measured():
    generator = torch.Generator().manual_seed(0)
    student_BTD, teacher_BTD = (torch.randn(2, 3, 6, generator=generator) for _ in range(2))
    weights_BT = torch.tensor([[0.04, 1.0, 25.0], [0.25, 4.0, 9.0]])
    surrogate = Surrogate(metric_DD=np.diag(np.arange(1.0, 7)).astype(np.float32), weights={}, digests={})
    batch = EmbeddingBatch(
        token_ids_BT=torch.zeros(2, 3, dtype=torch.int64),
        encoder_hidden_states_BTD=teacher_BTD,
        weights_BT=weights_BT,
    )
    root_DD = surrogate.root_DD(0.01, CPU)
    for power in (0.0, 0.5, 1.0):
        flags = {"loss": "sensitivity", "weight_power": power, "weight_floor": 0.1}
        objective = Objective(
            settings=TrainFlags.from_flags(student="any", **flags).settings(),
            backbones=[], context_ID=None, sigmas=[], surrogate=surrogate,
        )  # fmt: skip
        trained, judged = (
            sensitivity_loss(student_BTD, teacher_BTD, root_DD, weights_BT**at, floor=0.1) for at in (power, 1.0)
        )
        assert torch.equal(objective.training_loss(0, student_BTD, batch), trained)
        assert torch.equal(objective.text_loss(student_BTD, batch), judged)
        assert (power == 1.0) == torch.equal(trained, judged)


def test_training_by_it_constructs_no_transformer(tmp_path, cache, t5_config, monkeypatch):
    def refused(*given, **named):
        raise AssertionError("a transformer was constructed")

    monkeypatch.setattr(diffusers.FluxTransformer2DModel, "__init__", refused)
    run = run_training(tmp_path / "run", cache, None, t5_config, loss="sensitivity")
    assert (run / "checkpoint-000006").is_dir() or list(run.glob("checkpoint*"))


def test_it_may_be_the_warm_up_of_the_vision_loss(tmp_path, cache, t5_config, dev_teacher):
    import json

    run = run_training(
        tmp_path / "run", cache, dev_teacher, t5_config, steps=2, warmup_steps=2, warmup_loss="sensitivity"
    )
    kinds = [entry["kind"] for line in (run / "metrics.jsonl").open() if "kind" in (entry := json.loads(line))]
    assert kinds == ["sensitivity"] * 2 + ["vision"] * 2


def test_a_cache_that_was_not_measured_says_what_does_it(tmp_path, cache_folder, t5_config):
    with pytest.raises(BadSettings) as refused:
        run_training(tmp_path / "run", cache_folder, None, t5_config, loss="sensitivity")
    assert str(refused.value) == (
        f"--loss is sensitivity, but none was measured on {cache_folder}: `understudy sensitivity {cache_folder}` "
        f"does, once, with the transformer"
    )


def test_a_run_does_not_go_on_with_another_measurement(tmp_path, cache, t5_config, dev_teacher):
    run_training(tmp_path / "run", cache, None, t5_config, loss="sensitivity", steps=2)
    measured(cache, dev_teacher, seed=1)
    with pytest.raises(BadRun, match=r"begun with sensitivity of cache = [0-9a-f]{32}, you asked for [0-9a-f]{32}"):
        run_training(tmp_path / "run", cache, None, t5_config, loss="sensitivity", steps=2)


def test_prompts_that_were_not_sampled_have_predicted_weights_or_one(cache):
    one = Surrogate.read({"cache": Cache.open(cache)}).weights["cache"]
    embedding_TD = np.ones((12, 24), dtype=np.float32)
    assert one.of(one.measured.record.plan.prompt_ids[2], embedding_TD) is not None
    assert np.array_equal(one.of(one.measured.record.plan.prompt_ids[2], embedding_TD), one.measured.weights_NT[2])
    assert np.array_equal(one.of("another", embedding_TD), np.ones(12))
    predictor_D1 = np.append(np.zeros(24), np.log(3)).astype(np.float32)
    told = TokenWeights(measured=None, predictor_D1=predictor_D1).of("another", embedding_TD)
    assert told == pytest.approx(np.full(12, 3.0))


def test_caches_without_a_measurement_of_their_own_take_that_of_another(tmp_path, cache, cache_folder):
    found = Surrogate.read({"a": Cache.open(cache_folder), "b": Cache.open(cache)})
    alone = Surrogate.read({"b": Cache.open(cache)})
    assert np.array_equal(found.metric_DD, alone.metric_DD)
    assert found.weights["a"].measured is None and list(found.digests) == ["b"]
    assert list(found.remarks()) == ["no sensitivity was measured on a: the weights of its tokens are 1"]
    predicting = replace(found.weights["a"], predictor_D1=np.zeros(25, dtype=np.float32))
    (said,) = replace(found, weights={"a": predicting, "b": found.weights["b"]}).remarks()
    assert said == (
        "no sensitivity was measured on a: the weights of its tokens are predicted by what was measured on another"
    )


def test_a_measurement_that_is_not_finished_says_how_far_it_came(tmp_path, cache, t5_config):
    (cache / "sensitivity/record.json").unlink()
    with pytest.raises(BadSettings, match=r"--loss is sensitivity, but only 0 of 1 parts are on .*cache: `understudy"):
        run_training(tmp_path / "run", cache, None, t5_config, loss="sensitivity")


def test_a_measurement_of_too_few_prompts_to_predict_by_takes_the_predictor_of_the_largest(cache):
    few = sensitivity.read(Cache.open(cache).folder)
    largest = replace(few, predictor_D1=np.zeros(25, dtype=np.float32))
    own = replace(few, predictor_D1=np.ones(25, dtype=np.float32))
    assert few.predictor_D1 is None
    found = [_predictor_of(one, largest) for one in (few, None, own)]
    assert [one is expected.predictor_D1 for one, expected in zip(found, (largest, largest, own), strict=True)] == [
        True
    ] * 3


def test_huber_is_refused_beside_it(tmp_path, cache, t5_config):
    with pytest.raises(BadSettings, match="huber is 0.5 with loss sensitivity, expected none"):
        run_training(tmp_path / "run", cache, None, t5_config, loss="sensitivity", huber=0.5)


@pytest.mark.parametrize(
    ("flag", "value", "what"),
    [
        ("weight_power", 1000.0, "less than or equal to 4"),
        ("weight_floor", 1e300, "less than or equal to 1000000"),
        ("metric_floor", 1e300, "less than or equal to 1000000"),
        ("weight_power", float("nan"), "a finite number"),
        ("metric_floor", -1.0, "greater than or equal to 0"),
    ],
)
def test_a_power_or_floor_that_no_float_holds_is_refused_as_a_flag(flag, value, what):
    with pytest.raises(BadSettings) as refused:
        TrainFlags.from_flags(student="pocket-tiny", loss="sensitivity", **{flag: value})
    assert str(refused.value).startswith(f"--{flag.replace('_', '-')}: Input should be {what}")


def test_its_options_are_refused_where_nothing_is_trained_by_it_and_reach_its_stage_alone():
    with pytest.raises(BadSettings) as refused:
        TrainFlags.from_flags(student="s", warmup_steps=2, metric_floor=0.3)
    assert str(refused.value) == (
        "metric-floor is 0.3 with loss vision after context: it is an option of the sensitivity loss; leave it out, or "
        "take loss or warmup-loss sensitivity"
    )
    with pytest.raises(ValidationError, match=r"weight-power is 1 with loss embedding: it is an option of the sensit"):
        Stage(name="a", steps=2, loss="embedding", weight_power=1.0)
    # A warm-up that is not taken reads nothing.
    with pytest.raises(BadSettings, match="weight-floor is 0 with loss vision: it is an option"):
        TrainFlags.from_flags(student="s", warmup_loss="sensitivity", weight_floor=0.0)
    flags = {"warmup_steps": 2, "warmup_loss": "sensitivity", "weight_power": 0.75}
    before, after = TrainFlags.from_flags(student="s", **flags).settings().stages
    assert (before.weight_power, after.weight_power) == (0.75, Stage(name="a", steps=1).weight_power)

"""How it is minimised: parts, shared forwards, averages, schedules and arithmetic of the student alone."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from secondcast.models.student.folder import checkpoints, student_folder
from secondcast.models.student.student import load_student
from secondcast.storage_schemas.errors import NonFiniteError, SettingsError
from secondcast.trainer.data.replay_dataset import BatchSpec
from secondcast.trainer.optimizer import learning_rate
from secondcast.trainer.preparing.loading import uses_autocast
from secondcast.trainer.settings import TrainFlags
from tests.cache_builder.building import build_cache
from tests.trainer.making import gradient, make_trainer
from tests.trainer.test_train import run_training, weights


@pytest.fixture(scope="module")
def exact_cache(tmp_path_factory: pytest.TempPathFactory, dev_teacher: Path) -> Path:
    """In fp32, where a rounding error is one: bf16 would hide what is compared."""
    folder = tmp_path_factory.mktemp("exact")
    things = [f"a {c} {t}\n" for c in ("red", "green", "blue") for t in ("dog", "cat", "car")]
    (folder / "p.txt").write_text("".join(things))
    build_cache(folder / "cache", dev_teacher, folder / "p.txt", shard_size=8, batch_size=8, dtype="float32")
    return folder / "cache"


def nearly_the_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    assert one.keys() == other.keys()
    return all(float((one[n] - other[n]).norm()) <= 1e-4 * float(one[n].norm()) + 1e-9 for n in one)


@pytest.mark.parametrize(
    "flags", [{}, {"timesteps_per_sample": 2}, {"loss": "embedding"}, {"timestep_weighting": "sigma"}]
)
def test_a_batch_in_parts_is_the_large_batch_to_rounding(tmp_path, exact_cache, dev_teacher, t5_config, flags):
    whole = make_trainer(tmp_path, exact_cache, dev_teacher, t5_config, **flags)
    parts = make_trainer(tmp_path, exact_cache, dev_teacher, t5_config, grad_accum_steps=4, **flags)
    assert [len(request.rows) for request in parts.plan.requests(3)] == [2] * 4
    assert [row for request in parts.plan.requests(3) for row in request.rows] == list(whole.plan.requests(3)[0].rows)
    (loss, gradients), (loss_of_parts, of_parts) = gradient(whole, 3), gradient(parts, 3)
    assert loss_of_parts == pytest.approx(loss, rel=1e-5)
    assert nearly_the_same(gradients, of_parts)
    assert not nearly_the_same(gradients, gradient(whole, 4)[1])


def test_a_shared_forward_is_the_unshared_one_to_rounding(tmp_path, exact_cache, dev_teacher, t5_config):
    trainer = make_trainer(tmp_path, exact_cache, dev_teacher, t5_config, timesteps_per_sample=4)
    (request,) = trainer.plan.requests(0)
    seen: list[int] = []
    trainer.student.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    loss, shared = gradient(trainer, 0)
    trainer.plan.requests = lambda step: [BatchSpec(replays=True, rows=request.rows)]
    alone_loss, alone = gradient(trainer, 0)
    assert seen == [2, 8]
    assert alone_loss == pytest.approx(loss, rel=1e-5) and nearly_the_same(shared, alone)


def test_the_warm_up_shares_nothing_its_batch_is_of_as_many_prompts(tmp_path, exact_cache, dev_teacher, t5_config):
    trainer = make_trainer(tmp_path, exact_cache, dev_teacher, t5_config, timesteps_per_sample=4, pretrain_steps=1)
    assert len({position for position, _ in trainer.plan.requests(0)[0].rows}) == 8
    assert len({position for position, _ in trainer.plan.requests(1)[0].rows}) == 2


@pytest.mark.thorough
def test_the_average_is_the_formula_and_is_what_is_exported(tmp_path, exact_cache, dev_teacher, t5_config):
    flags = {"steps": 3, "checkpoint_every": 1, "keep_checkpoints": 9, "dropout": 0.0}
    run_training(tmp_path / "plain", exact_cache, dev_teacher, t5_config, **flags)
    run_training(tmp_path / "run", exact_cache, dev_teacher, t5_config, ema_decay=0.15, **flags)
    first = make_trainer(tmp_path / "x", exact_cache, dev_teacher, t5_config)
    average = {name: value.detach().clone() for name, value in first.student.named_parameters()}
    pairs = zip(checkpoints(tmp_path / "plain"), checkpoints(tmp_path / "run"), strict=True)
    for step, (plain, averaged) in enumerate(pairs):
        trained = load_file(averaged / "trained.safetensors")
        saved = load_student(averaged / "student").state_dict()
        decay = min(0.15, (1 + step) / (10 + step))
        for name in trained:
            # The average changes nothing of the training.
            assert torch.equal(trained[name], load_file(plain / "student/model.safetensors")[name])
            average[name] = decay * average[name] + (1 - decay) * trained[name]
            assert torch.allclose(saved[name], average[name], rtol=1e-5, atol=1e-7)
            assert saved[name].dtype == torch.float32
    assert (student_folder(tmp_path / "run") / "model.safetensors").is_file()
    assert not (checkpoints(tmp_path / "plain")[0] / "trained.safetensors").exists()


def test_validation_judges_the_average(tmp_path, cache_folder, dev_teacher, t5_config):
    trainer = make_trainer(tmp_path, cache_folder, dev_teacher, t5_config, ema_decay=0.9)
    before = trainer.validate(0)
    with torch.no_grad():
        for value in trainer.student.parameters():
            value.mul_(2)
    assert trainer.validate(0) == before
    trainer.train_state.average.update(trainer.student, 0)
    assert trainer.validate(0) != before


@pytest.mark.parametrize(
    ("flags", "rates"),
    [
        ({}, [1, 1, 1, 1, 1, 1]),
        ({"lr_warmup_steps": 4}, [0.25, 0.5, 0.25, 0.5, 0.75, 1]),
        ({"lr_schedule": "linear", "lr_warmup_steps": 0}, [1, 0.5, 1, 0.75, 0.5, 0.25]),
        ({"lr_schedule": "linear"}, [1 / 20, 0.5 * 2 / 20, 1 / 20, 0.75 * 2 / 20, 0.5 * 3 / 20, 0.25 * 4 / 20]),
        ({"lr_schedule": "cosine", "lr_warmup_steps": 0}, [1, 0.5, 1, 0.853553, 0.5, 0.146447]),
        ({"lr_schedule": "linear", "lr_warmup_steps": 2, "pretrain_lr": 4.0}, [2, 2, 0.5, 0.75, 0.5, 0.25]),
    ],
)
def test_the_learning_rate_of_each_stage(flags, rates):
    settings = TrainFlags.from_flags(student="x", pretrain_steps=2, steps=4, learning_rate=1.0, **flags).settings()
    assert [learning_rate(at.stage, at.position) for at in map(settings.at, range(6))] == pytest.approx(rates, rel=1e-5)


@pytest.mark.thorough
def test_autocast_is_around_the_student_alone_and_its_parameters_stay_fp32(
    tmp_path, cache_folder, dev_teacher, t5_config
):
    flags = {"student_dtype": "bfloat16-autocast", "steps": 2}
    trainer = make_trainer(tmp_path, cache_folder, dev_teacher, t5_config, **flags)
    seen = []

    def watch(_module, arguments, named):
        seen.append((torch.is_autocast_enabled("cpu"), named["encoder_hidden_states"].dtype))

    trainer.objective.backbones[0].transformer.register_forward_pre_hook(watch, with_kwargs=True)
    hidden = []
    trainer.student.register_forward_hook(lambda *_: hidden.append(torch.is_autocast_enabled("cpu")))
    loss, gradients = gradient(trainer, 0)
    assert seen == [(False, torch.bfloat16)] and hidden == [True]
    assert {value.dtype for value in gradients.values()} == {torch.float32}
    plain_loss, plain = gradient(make_trainer(tmp_path / "f", cache_folder, dev_teacher, t5_config), 0)
    assert loss == pytest.approx(plain_loss, rel=0.05) and not nearly_the_same(plain, gradients)
    run_training(tmp_path / "run", cache_folder, dev_teacher, t5_config, **flags)
    assert {value.dtype for value in weights(tmp_path / "run").values()} == {torch.float32}


@pytest.mark.parametrize(
    ("flags", "device", "dtype", "expected"),
    [
        ({}, "cuda", "bfloat16", True),
        ({}, "cuda", "float32", False),
        ({"backbone_dtype": "float32"}, "cuda", "bfloat16", False),
        ({}, "cpu", "bfloat16", False),
        ({"student_dtype": "float32"}, "cuda", "bfloat16", False),
        ({"student_dtype": "bfloat16-autocast"}, "cpu", "float32", True),
    ],
)
def test_auto_is_autocast_on_a_gpu_where_the_backbone_is_bf16(
    cache_folder, exact_cache, flags, device, dtype, expected
):
    from secondcast.storage_schemas.reader import Cache

    manifest = Cache.open(cache_folder if dtype == "bfloat16" else exact_cache).manifest
    assert (
        uses_autocast(TrainFlags.from_flags(student="x", **flags).settings(), manifest, torch.device(device))
        == expected
    )


FLOATS = {
    "learning_rate": 1e30, "pretrain_lr": 1e30, "weight_decay": 1e6, "position_bias_lr_scale": 1e6,
    "huber_delta": 1e12, "embedding_loss_weight": 1e12, "max_grad_norm": 1e12,
}  # fmt: skip


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("value", [1e39, float("inf"), float("nan")])
def test_a_number_that_float32_cannot_hold_is_refused_in_one_line(name, value):
    with pytest.raises(SettingsError) as caught:
        TrainFlags.from_flags(student="s", **{name: value})
    expected = f"at most {FLOATS[name]:.16g}" if math.isfinite(value) else "a finite number"
    assert str(caught.value) == f"--{name.replace('_', '-')} is {value}, expected {expected}"


def test_with_the_largest_numbers_it_stops_where_a_number_is_not_finite(tmp_path, exact_cache, dev_teacher, t5_config):
    flags = {**FLOATS, "steps": 3, "pretrain_steps": 2, "pretrain_loss": "embedding", "checkpoint_every": 100}
    with pytest.raises(NonFiniteError, match=r"is (nan|inf).*: stopped, the last checkpoint is intact"):
        run_training(tmp_path / "run", exact_cache, dev_teacher, t5_config, **flags)

"""What is minimised: each option is the formula it is named for, and off it changes nothing."""

import json
import shutil
from pathlib import Path
from typing import get_args

import pytest
import torch
from diffusers import FluxTransformer2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from secondcast.models.teacher.context_projection import load_context_projection
from secondcast.models.teacher.folder import REPLAY_PARTS, find_teacher
from secondcast.storage_schemas.errors import SettingsError, TeacherError
from secondcast.storage_schemas.reader import Cache
from secondcast.trainer.loss_kinds import LOSSES, LOSSES_HELP, Loss
from secondcast.trainer.losses.context import context_loss
from secondcast.trainer.losses.difference import difference
from secondcast.trainer.losses.embedding import embedding_loss
from secondcast.trainer.losses.vision import row_errors, timestep_weighting, vision_loss
from secondcast.trainer.settings import TrainOptions
from secondcast.trainer.stage import StageOptions
from tests.cache_builder.building import build_cache
from tests.models.families.random_teacher import make_teacher
from tests.trainer.making import CPU, make_trainer
from tests.trainer.test_train import run_training

FLOATS = st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=20)


@settings(max_examples=40)
@given(values=FLOATS, huber=st.floats(0.01, 50))
def test_huber_is_the_square_inside_and_its_tangent_outside(values, huber):
    found = torch.tensor(values)
    by_hand = [x * x if abs(x) <= huber else 2 * huber * abs(x) - huber * huber for x in values]
    mean = sum(by_hand) / len(by_hand)
    assert float(difference(found, torch.zeros_like(found), huber)) == pytest.approx(mean, rel=1e-4, abs=1e-6)


@settings(max_examples=40)
@given(values=FLOATS)
def test_a_huber_above_every_difference_is_the_squared_loss(values):
    found = torch.tensor(values)
    squared = difference(found, torch.zeros_like(found))
    assert torch.allclose(difference(found, torch.zeros_like(found), 1000.0), squared, rtol=1e-5)


@settings(max_examples=40)
@given(sigmas=st.lists(st.floats(0.01, 1), min_size=2, max_size=20, unique=True))
def test_weights_of_steps_are_what_they_are_named_for_with_mean_one(sigmas):
    falling = sorted(sigmas, reverse=True)
    assert timestep_weighting("uniform", falling) is None
    by_sigma, by_interval = timestep_weighting("sigma", falling), timestep_weighting("interval", falling)
    steps = len(falling) - 1
    for k in range(steps):
        assert float(by_sigma[k]) == pytest.approx(falling[k] * steps / sum(falling[:-1]), rel=1e-5)
        interval = (falling[k] - falling[k + 1]) * steps / (falling[0] - falling[-1])
        assert float(by_interval[k]) == pytest.approx(interval, rel=1e-4, abs=1e-6)
    assert float(by_sigma.mean()) == pytest.approx(1, rel=1e-5)


def test_weighted_rows_are_weighted_by_their_own_step(tmp_path, cache_folder, dev_teacher, t5_config):
    trainer = make_trainer(tmp_path, cache_folder, dev_teacher, t5_config, timestep_weighting="sigma")
    backbone, weights_K = trainer.objective.backbones[0], trainer.objective.weights(trainer.settings.stages[0], 0, CPU)
    rows = [(0, 0), (1, 0), (2, 1)]
    batch = trainer.dataset.replay_batch(rows)
    with torch.no_grad():
        student_BTD = trainer.embed(trainer.student.eval(), batch.token_ids_BT)
        alone = [
            vision_loss(backbone, student_BTD[i : i + 1], trainer.dataset.replay_batch([row]))
            for i, row in enumerate(rows)
        ]
        weighted = trainer.objective.training_loss(trainer.settings.at(0).stage, student_BTD, batch)
        plain = row_errors(backbone, student_BTD, batch).mean()
    by_hand = sum(float(weights_K[k]) * float(loss) for (_, k), loss in zip(rows, alone, strict=True)) / 3
    assert float(weighted) == pytest.approx(by_hand, rel=0.01)
    assert float(plain) == pytest.approx(sum(map(float, alone)) / 3, rel=0.01)
    assert abs(float(weighted) - float(plain)) > 0.05 * float(plain)


def test_an_embedding_term_is_added_with_its_weight(tmp_path, cache_folder, dev_teacher, t5_config):
    trainer = make_trainer(
        tmp_path, cache_folder, dev_teacher, t5_config, embedding_loss_weight=0.5, timesteps_per_sample=2
    )
    (request,) = trainer.plan.requests(0)
    with trainer.dataset.prefetch([request]) as batches, torch.no_grad():
        batch = next(batches)
        student_BTD = trainer.embed(trainer.student.eval(), batch.token_ids_BT)
        assert len(student_BTD) == 4
        found = trainer.objective.training_loss(trainer.settings.at(0).stage, student_BTD, batch)
        vision = vision_loss(trainer.objective.backbones[0], student_BTD, batch)
        term = embedding_loss(student_BTD, batch.encoder_hidden_states_BTD)
    assert torch.equal(found, vision + 0.5 * term) and float(term) > 0


def test_huber_is_for_the_stage_after_the_warm_up_alone(tmp_path, cache_folder, dev_teacher, t5_config):
    flags = {"pretrain_steps": 1, "pretrain_loss": "embedding", "loss": "embedding", "huber_delta": 0.01}
    trainer = make_trainer(tmp_path, cache_folder, dev_teacher, t5_config, **flags)
    batch = trainer.dataset.embedding_batch([0, 1])
    student_BTD = torch.zeros_like(batch.encoder_hidden_states_BTD)
    wanted_BTD = batch.encoder_hidden_states_BTD
    assert torch.equal(
        trainer.objective.training_loss(trainer.settings.at(0).stage, student_BTD, batch),
        difference(student_BTD, wanted_BTD),
    )
    assert torch.equal(
        trainer.objective.training_loss(trainer.settings.at(1).stage, student_BTD, batch),
        difference(student_BTD, wanted_BTD, 0.01),
    )


def test_what_the_projection_maps_to_zero_costs_nothing():
    torch.manual_seed(0)
    weight_ID, teacher_BTD = torch.randn(8, 24), torch.randn(2, 3, 24)
    unseen_DN = torch.linalg.svd(weight_ID).Vh[8:].T
    student_BTD = teacher_BTD + (unseen_DN @ torch.randn(16)) * 3
    assert float(embedding_loss(student_BTD, teacher_BTD)) > 1
    assert float(context_loss(student_BTD, teacher_BTD, weight_ID)) < 1e-9


def test_the_context_loss_is_the_difference_after_the_transformers_own_projection(
    tmp_path, cache_folder, dev_teacher, t5_config
):
    trainer = make_trainer(tmp_path, cache_folder, dev_teacher, t5_config, loss="context")
    assert not trainer.objective.backbones
    transformer = FluxTransformer2DModel.from_pretrained(dev_teacher / "transformer", torch_dtype=torch.float32)
    batch = trainer.dataset.embedding_batch([0, 3, 5])
    with torch.no_grad():
        student_BTD = trainer.embed(trainer.student.eval(), batch.token_ids_BT)
        found = trainer.objective.training_loss(trainer.settings.at(0).stage, student_BTD, batch)
        projected = [transformer.context_embedder(x.float()) for x in (student_BTD, batch.encoder_hidden_states_BTD)]
    assert torch.allclose(found, torch.nn.functional.mse_loss(*projected), rtol=1e-5)
    assert torch.equal(trainer.objective.text_loss(student_BTD, batch), found)


@pytest.fixture(scope="module")
def sharded_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher whose transformer lies in several files with an index, as FLUX.1-dev's does."""
    folder = make_teacher(tmp_path_factory.mktemp("sharded") / "teacher", seed=2)
    transformer = FluxTransformer2DModel.from_pretrained(folder / "transformer", torch_dtype=torch.bfloat16)
    shutil.rmtree(folder / "transformer")
    transformer.save_pretrained(folder / "transformer", max_shard_size="40KB")
    return folder


@pytest.fixture(scope="module")
def sharded_cache(tmp_path_factory: pytest.TempPathFactory, sharded_teacher: Path) -> Path:
    folder = tmp_path_factory.mktemp("sharded-cache")
    (folder / "p.txt").write_text("a red dog\na red cat\na red car\n")
    build_cache(folder / "cache", sharded_teacher, folder / "p.txt")
    return folder / "cache"


def only_the_file_of(key: str, teacher: Path, to: Path) -> Path:
    shutil.copytree(teacher / "transformer", to / "transformer")
    index = json.loads((to / "transformer/diffusion_pytorch_model.safetensors.index.json").read_bytes())
    files = sorted((to / "transformer").glob("*.safetensors"))
    assert len(files) > 2
    for file in files:
        if file.name != index["weight_map"][key]:
            file.unlink()
    return to / "transformer" / index["weight_map"][key]


@pytest.mark.thorough
def test_the_context_loss_reads_one_tensor_of_the_transformer(tmp_path, sharded_teacher, sharded_cache, t5_config):
    file = only_the_file_of("context_embedder.weight", sharded_teacher, tmp_path / "t")
    found = load_context_projection(
        find_teacher(str(tmp_path / "t"), REPLAY_PARTS), Cache.open(sharded_cache).manifest.teacher, CPU
    )
    with safe_open(file, framework="pt") as tensors:
        assert torch.equal(found, tensors.get_tensor("context_embedder.weight").float())
    flags = {"steps": 0, "pretrain_steps": 30, "pretrain_loss": "context", "batch_size": 3, "learning_rate": 3e-3}
    run_training(tmp_path / "run", sharded_cache, tmp_path / "t", t5_config, dropout=0.0, **flags)
    entries = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in entries if "kind" in entry]
    assert {entry["kind"] for entry in entries if "kind" in entry} == {"context"}
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_a_projection_of_another_model_or_a_damaged_one_is_refused(tmp_path, sharded_teacher, sharded_cache):
    recorded = Cache.open(sharded_cache).manifest.teacher
    file = only_the_file_of("context_embedder.weight", sharded_teacher, tmp_path / "t")
    folder = find_teacher(str(tmp_path / "t"), REPLAY_PARTS)
    tensors = load_file(file)
    tensors["context_embedder.weight"] += 1
    save_file(tensors, file)
    with pytest.raises(
        TeacherError, match=rf"{file} has sha256 \w{{16}}, but the cache was recorded with \w{{16}}, another mod"
    ):
        load_context_projection(folder, recorded, CPU)
    file.unlink()
    with pytest.raises(TeacherError, match=rf"context_embedder.weight cannot be read from {file.name} \(No such file"):
        load_context_projection(folder, recorded, CPU)
    index = tmp_path / "t/transformer/diffusion_pytorch_model.safetensors.index.json"
    index.write_text('{"weight_map": {}}')
    with pytest.raises(TeacherError, match=rf"{index} does not list context_embedder.weight, expected the index"):
        load_context_projection(folder, recorded, CPU)


def test_the_registry_names_every_loss_once_and_each_says_what_it_is():
    assert set(LOSSES) == set(get_args(Loss)) and all(kind.help and kind.card for kind in LOSSES.values())
    assert TrainOptions.model_fields["loss"].description == LOSSES_HELP
    named = [name for kind in LOSSES.values() for name in kind.options]
    assert len(named) == len(set(named)) and set(named) <= set(StageOptions.model_fields)


@pytest.mark.parametrize(("loss", "name"), [(loss, name) for loss, kind in LOSSES.items() for name in kind.options])
def test_an_option_of_one_loss_is_refused_with_another(loss, name):
    value = {
        "timestep_weighting": "sigma",
        "embedding_loss_weight": 0.5,
        "context_loss_weight": 0.5,
        "timesteps_per_sample": 2,
        "depth_blocks": 2,
    }[name]
    other = next(kind for kind in LOSSES if kind != loss)
    said = rf"{name.replace('_', '-')} is {value} with loss {other}: it only applies to the {loss} loss"
    with pytest.raises(SettingsError, match=said):
        StageOptions.from_flags(loss=other, **{name: value})

"""The depth loss: normalised by what is measured once, blind to nothing but the teacher's own embedding."""

import json
from dataclasses import replace
from functools import partial
from itertools import permutations

import pytest
import torch

from secondcast.models.families.flux import FLUX
from secondcast.models.teacher.folder import REPLAY_PARTS, find_teacher
from secondcast.storage_schemas.errors import RunError, SettingsError
from secondcast.storage_schemas.reader import Cache
from secondcast.trainer.losses.depth import _records, depth_errors, measure_variances
from secondcast.trainer.losses.validation import validation_rows
from secondcast.trainer.preparing import stream_variances as preparing
from secondcast.trainer.run.config import StreamVariances
from secondcast.trainer.settings import TrainFlags, TrainSettings
from secondcast.trainer.stage import Stage
from secondcast.trainer.train import train
from tests.cache_builder.building import build_cache
from tests.trainer.making import CPU, gradient, make_trainer
from tests.trainer.run.test_kills import KillAfter, assert_same_run, was_killed
from tests.trainer.test_train import Listening, StopAfter, run_training

DEPTH = {"loss": "depth", "depth_blocks": 1}


@pytest.fixture
def made(tmp_path, cache_folder, dev_teacher, t5_config):
    return partial(make_trainer, tmp_path / "run", cache_folder, dev_teacher, t5_config, **{"batch_size": 4, **DEPTH})


def measured(trainer) -> StreamVariances:
    return trainer.objective.stream_variances[1]


def entries(run) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_teachers_embedding_has_no_error(made):
    trainer = made()
    batch = trainer.dataset.replay_batch([(0, 0), (5, 1), (9, 0)], embeddings=True)
    teacher_BTD = batch.encoder_hidden_states_BTD.clone().requires_grad_()
    errors_B = depth_errors(trainer.objective.backbones[0], teacher_BTD, batch, measured(trainer))
    assert errors_B.tolist() == [0, 0, 0]


@torch.no_grad()
def test_the_embedding_of_another_prompt_has_the_error_2_on_average(made):
    # Of independent draws the mean squared difference is twice their variance; over all pairs of a sample exactly.
    trainer = made(backbone_dtype="float32")
    dataset, backbone = trainer.dataset, trainer.objective.backbones[0]
    records = _records(dataset, 0)
    embeddings_PTD = dataset.teacher_embeddings([dataset.prompt_of(position) for position, _ in records])
    variances = measure_variances([backbone], dataset, 1, batch_rows=5)
    firsts, others = zip(*permutations(range(len(embeddings_PTD)), 2), strict=True)
    sums = []
    for record in records:
        batch = dataset.replay_batch([record] * len(firsts))
        batch = replace(batch, encoder_hidden_states_BTD=embeddings_PTD[list(firsts)])
        sums.append(depth_errors(backbone, embeddings_PTD[list(others)], batch, variances).double().mean())
    assert float(torch.stack(sums).mean()) == pytest.approx(2, rel=1e-4)


def test_what_is_measured_does_not_depend_on_the_rows_of_a_pass(made):
    trainer = made(backbone_dtype="float32")
    one, other = (
        measure_variances(trainer.objective.backbones, trainer.dataset, 1, batch_rows=rows) for rows in (3, 16)
    )
    # Products of other sizes are rounded otherwise, in the last digits of float32.
    assert one.hidden_states == pytest.approx(other.hidden_states, rel=1e-4)
    assert one.encoder_hidden_states == pytest.approx(other.encoder_hidden_states, rel=1e-4)


def test_records_are_of_different_prompts_and_spread_over_trajectories_and_steps(made):
    dataset = made().dataset
    records = _records(dataset, 0)
    steps = dataset.sources[0].cache.manifest.sampling.steps
    assert len({dataset.prompt_of(position) for position, _ in records}) == len(records) > 8
    assert {k for _, k in records} == set(range(steps))
    assert records[0][0] == 0 and records[-1][0] > len(dataset) * 3 // 4


def test_both_streams_count_each_in_its_own_variance(made):
    trainer = made()
    backbone, variances = trainer.objective.backbones[0], measured(trainer)
    batch = trainer.dataset.replay_batch([(0, 0), (5, 1)], embeddings=True)
    student_BTD = batch.encoder_hidden_states_BTD.roll(1, 0)
    wanted, found = (
        backbone.streams(1, batch.hidden_states_BSC, given, batch.conditioning, batch.timestep_B, batch.guidance_B)
        for given in (batch.encoder_hidden_states_BTD, student_BTD)
    )
    image, text = ((a.double() - b.double()).square().mean() for a, b in zip(found, wanted, strict=True))
    by_hand = (image / variances.hidden_states + text / variances.encoder_hidden_states) / 2
    errors_B = depth_errors(backbone, student_BTD, batch, variances)
    assert float(errors_B.mean()) == pytest.approx(float(by_hand), rel=1e-5)
    linear_B = depth_errors(backbone, student_BTD, batch, variances, huber=0.1)
    assert bool((linear_B < errors_B).all())


@pytest.mark.parametrize("memory", [{}, {"activation_checkpointing": 1}, {"gpu_blocks": 0}, {"modulation": "gpu"}])
def test_its_gradient_reaches_the_student_alone_in_every_memory_mode(made, memory):
    trainer, plain = made(**memory), made()
    loss, gradients = gradient(trainer, 0)
    assert loss > 0 and any(float(value.abs().max()) > 0 for value in gradients.values())
    transformer = trainer.objective.backbones[0].transformer
    assert all(p.grad is None and not p.requires_grad for p in transformer.parameters())
    assert not trainer.objective.predicts and len(FLUX.anatomy.blocks(transformer)) == 1
    expected, wanted = gradient(plain, 0)
    assert loss == expected and all(torch.equal(gradients[name], wanted[name]) for name in wanted)


def test_a_run_learns_and_is_validated_by_its_own_loss(tmp_path, cache_folder, dev_teacher, t5_config):
    heard = Listening()
    flags = {"steps": 40, "checkpoint_every": 20, "batch_size": 8, "learning_rate": 3e-3, "dropout": 0.0, **DEPTH}
    run = run_training(tmp_path / "run", cache_folder, dev_teacher, t5_config, progress=heard, **flags)
    losses = [entry["loss"] for entry in entries(run) if "kind" in entry]
    assert {entry["kind"] for entry in entries(run) if "kind" in entry} == {"depth"}
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    found = [entry for entry in entries(run) if "validation_loss" in entry]
    assert len(found) == 2 and not any("validation_loss_by_step" in entry for entry in found)
    assert not any("replay error" in line for line in heard.heard)
    config = json.loads((run / "config.json").read_bytes())
    (kept,) = config["stream_variances"]
    assert (
        f"variance between prompts after 1 block: {kept['hidden_states']:.4g} of the image stream, "
        f"{kept['encoder_hidden_states']:.4g} of the text stream; the depth loss is measured in it"
    ) in heard.heard


@torch.no_grad()
def test_the_validation_loss_of_such_a_run_is_the_mean_error_of_held_out_records(made):
    trainer = made(validate_rows=8)
    student = trainer.student.eval()
    errors = []
    for row in validation_rows(trainer.held_out, 8):
        batch = trainer.held_out.replay_batch([row], embeddings=True)
        found_BTD = trainer.embed(student, batch.token_ids_BT)
        errors += depth_errors(trainer.objective.backbones[0], found_BTD, batch, measured(trainer)).tolist()
    # Alone in a batch a row is rounded otherwise.
    assert trainer.validate(0) == pytest.approx(sum(errors) / len(errors), rel=0.02)


def test_a_resumed_run_divides_by_the_variances_that_it_began_with(
    tmp_path, cache_folder, dev_teacher, t5_config, monkeypatch
):
    teach = partial(run_training, cache=cache_folder, teacher=dev_teacher, student=t5_config, **DEPTH)
    teach(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        teach(tmp_path / "run", progress=StopAfter(3))
    before = (tmp_path / "run/config.json").read_bytes()

    def refuse(*arguments, **named):
        raise AssertionError("measured again")

    monkeypatch.setattr(preparing, "measure_variances", refuse)
    teach(tmp_path / "run")
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    assert (tmp_path / "run/config.json").read_bytes() == before
    # What is kept is what is used: with another number the run ends elsewhere.
    changed = json.loads(before)
    changed["stream_variances"][0]["hidden_states"] *= 4
    monkeypatch.undo()
    with pytest.raises(KeyboardInterrupt):
        teach(tmp_path / "other", progress=StopAfter(3))
    (tmp_path / "other/config.json").write_text(json.dumps(changed))
    teach(tmp_path / "other")
    losses = [[entry["loss"] for entry in entries(tmp_path / name) if "kind" in entry] for name in ("whole", "other")]
    assert losses[0][:2] == losses[1][:2] and losses[0][2:] != losses[1][2:]


@pytest.mark.parametrize("lost", ["key", "blocks"])
def test_a_run_whose_config_lost_its_variances_is_not_resumed(tmp_path, cache_folder, dev_teacher, t5_config, lost):
    teach = partial(run_training, cache=cache_folder, teacher=dev_teacher, student=t5_config, **DEPTH)
    with pytest.raises(KeyboardInterrupt):
        teach(tmp_path / "run", progress=StopAfter(3))
    file = tmp_path / "run/config.json"
    config = json.loads(file.read_bytes())
    if lost == "key":
        del config["stream_variances"]
    else:
        config["stream_variances"][0]["blocks"] = 2
    file.write_text(json.dumps(config))
    with pytest.raises(RunError) as raised:
        teach(tmp_path / "run")
    assert str(raised.value) == (
        f"{file} has stream_variances of depth-blocks {[] if lost == 'key' else [2]}, expected those of [1]: the depth "
        f"loss of this run divides by them; restore the file, or give a new run folder"
    )


@pytest.mark.thorough
def test_a_killed_run_ends_as_one_that_was_not(tmp_path, cache_folder, dev_teacher, t5_config):
    teach = partial(run_training, cache=cache_folder, teacher=dev_teacher, student=t5_config, dropout=0.1, **DEPTH)
    teach(tmp_path / "whole")
    for steps in (1, 4):
        assert was_killed(lambda steps=steps: teach(tmp_path / "run", progress=KillAfter(steps)))
    teach(tmp_path / "run")
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def run_stages(run, cache_folder, teacher, student, stages) -> Listening:
    settings = TrainSettings(
        student=str(student), stages=tuple(stages), replay_check=4, validate_rows=8, checkpoint_every=2
    )
    heard = Listening()
    caches, folder = {"cache": Cache.open(cache_folder)}, find_teacher(str(teacher), REPLAY_PARTS)
    train(run, settings, caches, folder, CPU, heard, student_source=str(student))
    return heard


def stage(name: str, loss: str, **options) -> Stage:
    return Stage(name=name, loss=loss, steps=2, batch_size=4, **options)


@pytest.mark.thorough
def test_before_a_vision_stage_the_whole_transformer_is_loaded_and_validates(
    tmp_path, cache_folder, dev_teacher, t5_config
):
    stages = [stage("a", "context"), stage("b", "depth", depth_blocks=2), stage("c", "depth"), stage("d", "vision")]
    heard = run_stages(tmp_path / "run", cache_folder, dev_teacher, t5_config, stages)
    assert sum("replay error" in line for line in heard.heard) == 1
    assert [entry["kind"] for entry in entries(tmp_path / "run") if "kind" in entry] == [
        *["context"] * 2, *["depth"] * 4, *["vision"] * 2
    ]  # fmt: skip
    assert all("validation_loss_by_step" in e for e in entries(tmp_path / "run") if "validation_loss" in e)
    kept = json.loads((tmp_path / "run/config.json").read_bytes())["stream_variances"]
    assert [one["blocks"] for one in kept] == [1, 2]


@pytest.mark.thorough
def test_without_a_vision_stage_the_deepest_blocks_are_loaded_and_validate(
    tmp_path, cache_folder, dev_teacher, t5_config
):
    stages = [stage("a", "context"), stage("b", "depth", depth_blocks=2), stage("c", "depth")]
    heard = run_stages(tmp_path / "run", cache_folder, dev_teacher, t5_config, stages)
    assert not any("replay error" in line for line in heard.heard)
    assert not any("validation_loss_by_step" in entry for entry in entries(tmp_path / "run"))
    run_stages(tmp_path / "one", cache_folder, dev_teacher, t5_config, stages[:2])
    first, other = (
        next(entry["validation_loss"] for entry in entries(tmp_path / run) if "validation_loss" in entry)
        for run in ("run", "one")
    )
    assert first == other


def test_more_blocks_than_the_transformer_has_are_refused(tmp_path, cache_folder, dev_teacher, t5_config):
    said = "--depth-blocks is 9, expected 1 to 3, the number of blocks of this transformer: use 3"
    with pytest.raises(SettingsError) as error:
        run_training(tmp_path / "run", cache_folder, dev_teacher, t5_config, loss="depth", depth_blocks=9)
    assert str(error.value) == said and not (tmp_path / "run/config.json").exists()
    stages = [stage("early", "depth", depth_blocks=4)]
    with pytest.raises(SettingsError, match=r"^stage early has depth-blocks 4, expected 1 to 3, the number of blocks"):
        run_stages(tmp_path / "run", cache_folder, dev_teacher, t5_config, stages)
    with pytest.raises(SettingsError, match="--depth-blocks is 0"):
        TrainFlags.from_flags(student="any", loss="depth", depth_blocks=0)


def test_more_resident_blocks_than_are_loaded_are_refused(tmp_path, cache_folder, dev_teacher, t5_config):
    said = "--gpu-blocks is 2, expected 0 to 1, the number of loaded blocks of this transformer: use 1"
    with pytest.raises(SettingsError) as error:
        run_training(tmp_path / "run", cache_folder, dev_teacher, t5_config, gpu_blocks=2, **DEPTH)
    assert str(error.value) == said


def test_a_cache_with_one_prompt_is_refused(tmp_path, dev_teacher, t5_config):
    (tmp_path / "p.txt").write_text("a red dog\n")
    build_cache(tmp_path / "cache", dev_teacher, tmp_path / "p.txt")
    with pytest.raises(SettingsError) as error:
        run_training(tmp_path / "run", tmp_path / "cache", dev_teacher, t5_config, **DEPTH)
    assert str(error.value) == (
        f"{tmp_path / 'cache'} has 1 prompt to train on, expected at least 2: the depth loss is normalised by the "
        f"variance between prompts; build more prompts"
    )


def test_streams_that_do_not_vary_are_refused(made, monkeypatch):
    trainer = made()
    monkeypatch.setattr(
        trainer.dataset, "teacher_embeddings", lambda prompts: torch.zeros(len(prompts), 12, 24, dtype=torch.bfloat16)
    )
    with pytest.raises(SettingsError, match=r"stream after 1 block are 0 and 0, expected finite numbers above 0: the"):
        measure_variances(trainer.objective.backbones, trainer.dataset, 1, batch_rows=4)

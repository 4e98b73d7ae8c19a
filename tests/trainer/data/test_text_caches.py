"""Training on text caches: alone, before a vision stage, and beside its trajectories."""

import json
import re
from pathlib import Path

import pytest
import torch

from secondcast.models.teacher.context_projection import load_context_projection
from secondcast.models.teacher.folder import REPLAY_PARTS, find_teacher
from secondcast.storage_schemas.errors import NonFiniteError, NoTrajectoriesError, SettingsError
from secondcast.storage_schemas.progress import Silent
from secondcast.storage_schemas.reader import Cache
from secondcast.trainer.data.batch_plan import BatchPlan
from secondcast.trainer.data.mixture import TrainingCache, split
from secondcast.trainer.loop import Trainer
from secondcast.trainer.losses import objective
from secondcast.trainer.losses.context import context_loss
from secondcast.trainer.losses.vision import vision_loss
from secondcast.trainer.settings import TrainSettings
from secondcast.trainer.stage import Stage
from secondcast.trainer.train import train
from secondcast.trainer.training_set import TrainingSet
from tests.cache_builder.building import build_cache
from tests.trainer.test_train import StopAfter, same_weights

CPU = torch.device("cpu")
VISION = {"name": "vision", "steps": 4, "batch_size": 4, "grad_accum_steps": 2, "context_loss_weight": 0.3}
CONTEXT = {"name": "pretrain", "loss": "context", "steps": 3, "batch_size": 4}


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory: pytest.TempPathFactory, dev_teacher: Path) -> Path:
    folder = tmp_path_factory.mktemp("text")
    (folder / "p.txt").write_text("".join(f"a {word} house by the sea\n" for word in "abcdefghij") + "two dogs 31\n")
    build_cache(folder / "cache", dev_teacher, folder / "p.txt", steps=20, text_only=True)
    return folder / "cache"


class Told(Silent):
    """What a run trained on, at its first step."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def say(self, message):
        self.heard.append(message)


def run_stages(run: Path, caches: dict[str, Path], teacher: Path, student: Path, *stages, progress=None, **options):
    options = {"dropout": 0.1, "checkpoint_every": 2, "replay_check": 4, "validate_rows": 8} | options
    settings = TrainSettings(student=str(student), stages=tuple(Stage(**stage) for stage in stages), **options)
    opened = {name: Cache.open(folder) for name, folder in caches.items()}
    folder = find_teacher(str(teacher), REPLAY_PARTS)
    train(run, settings, opened, folder, CPU, progress or Silent(), student_source=str(student))
    return run


def steps_of(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "kind" in line]


def test_a_context_stage_trains_on_a_text_cache_alone(tmp_path, text_folder, dev_teacher, t5_config):
    told = Told()
    run = run_stages(tmp_path / "r", {"t": text_folder}, dev_teacher, t5_config, CONTEXT, progress=told)
    assert [step["kind"] for step in steps_of(run)] == ["context"] * 3
    assert any("10 prompts to train on, 1 held out" in line for line in told.heard)
    assert json.loads((run / "config.json").read_text())["recorded"] is None


def test_both_kinds_of_cache_train_one_student(tmp_path, text_folder, cache_folder, dev_teacher, t5_config):
    told, caches = Told(), {"a-text": text_folder, "walks": cache_folder}
    run = run_stages(tmp_path / "r", caches, dev_teacher, t5_config, CONTEXT, VISION, progress=told)
    steps = steps_of(run)
    assert [step["kind"] for step in steps] == ["context"] * 3 + ["vision"] * 4
    assert all(step["weighted_context_loss"] > 0 for step in steps[3:])
    assert any("trajectories and 10 prompts of 2 caches to train on" in line for line in told.heard)


@pytest.mark.parametrize("killed_after", [2, 5])
def test_killed_and_resumed_it_ends_with_the_weights_of_an_unbroken_run(
    tmp_path, text_folder, cache_folder, dev_teacher, t5_config, killed_after
):
    caches = {"text": text_folder, "walks": cache_folder}
    for name in ("whole", "broken"):
        if name == "broken":
            with pytest.raises(KeyboardInterrupt):
                run_stages(
                    tmp_path / name, caches, dev_teacher, t5_config, CONTEXT, VISION, progress=StopAfter(killed_after)
                )
        run_stages(tmp_path / name, caches, dev_teacher, t5_config, CONTEXT, VISION)
    assert same_weights(tmp_path / "whole", tmp_path / "broken")


@pytest.mark.parametrize("stage", [VISION, CONTEXT])
def test_the_rows_of_a_part_are_those_that_its_process_reads(text_folder, cache_folder, stage):
    settings = TrainSettings(student="s", stages=(Stage(**stage),))
    caches = {"walks": Cache.open(cache_folder), "text": Cache.open(text_folder)}
    training_caches = [
        TrainingCache(name=name, cache=cache, training_set=TrainingSet.of(cache)) for name, cache in caches.items()
    ]
    dataset, _ = split(training_caches, CPU)
    plans = [BatchPlan(settings, training_caches, dataset, rank=rank, ranks=2) for rank in range(2)]
    # In the order in which the losses of all processes are gathered.
    at, requests = settings.at(1), [request for plan in plans for request in plan.requests(1)]
    assert len(requests) == 2 * at.stage.parts_per_process
    read = [(request.rows, request.replays != at.stage.replays) for request in requests]
    for plan in plans:
        assert [plan.rows_of_part(at, number) for number in range(len(requests))] == read


def test_the_gradient_is_that_of_both_losses(tmp_path, text_folder, cache_folder, dev_teacher, t5_config, monkeypatch):
    made: list[Trainer] = []
    monkeypatch.setattr(Trainer, "train", lambda self, progress: made.append(self))
    caches, stage = {"text": text_folder, "walks": cache_folder}, VISION | {"grad_accum_steps": 1}
    run_stages(tmp_path / "r", caches, dev_teacher, t5_config, stage, dropout=0.0)
    (trainer,) = made
    at, student = trainer.settings.at(0), trainer.student.train()
    with trainer.dataset.prefetch(trainer.plan.requests(0)) as batches:
        rows, prompts = list(batches)
    student.zero_grad()
    for part, batch in enumerate((rows, prompts)):
        trainer._gradients(at, part, batch)
    found = torch.cat([value.grad.flatten() for value in student.parameters()])
    student.zero_grad()
    recorded = trainer.dataset.sources[0].cache.manifest.teacher
    weight_ID = load_context_projection(find_teacher(str(dev_teacher), REPLAY_PARTS), recorded, CPU)
    loss = vision_loss(trainer.objective.backbones[0], student(rows.token_ids_BT)[0], rows)
    teacher_BTD = prompts.encoder_hidden_states_BTD
    (loss + 0.3 * context_loss(student(prompts.token_ids_BT)[0], teacher_BTD, weight_ID)).backward()
    expected = torch.cat([value.grad.flatten() for value in student.parameters()])
    # The same sums in another order, in fp32.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))


def test_a_loss_of_prompts_beside_trajectories_that_is_not_finite_names_them(
    tmp_path, text_folder, cache_folder, dev_teacher, t5_config, monkeypatch
):
    monkeypatch.setattr(objective, "context_loss", lambda *batch: torch.inf * context_loss(*batch))
    caches = {"cache": cache_folder, "text": text_folder}
    with pytest.raises(NonFiniteError) as raised:
        run_stages(tmp_path / "run", caches, dev_teacher, t5_config, VISION)
    stopped = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert stopped["step"] == 0 and {*stopped["records"]} <= {prompt.id for prompt in Cache.open(text_folder).prompts}
    assert str(raised.value) == (
        f"context loss is inf at step 0, in the batch of {', '.join(stopped['records'])}: stopped, the last checkpoint "
        "is intact; lower --learning-rate and run it again with a new run folder"
    )


def test_held_out_prompts_are_never_trained_on(tmp_path, text_folder, dev_teacher, t5_config):
    cache = Cache.open(text_folder)
    training_caches = [TrainingCache(name="text", cache=cache, training_set=TrainingSet.of(cache))]
    training, held_out = split(training_caches, CPU)
    names = [{dataset.name_of(position) for position in range(len(dataset))} for dataset in (training, held_out)]
    expected = {prompt.id for prompt in cache.prompts if prompt.held_out}
    assert names[1] == expected and len(expected) == 1
    assert names[0] == {prompt.id for prompt in cache.prompts} - expected


@pytest.mark.parametrize(
    ("names", "stages", "error", "said"),
    [
        (["text"], [{"name": "main", "steps": 2}], NoTrajectoriesError, "the vision loss needs trajectories, but "),
        (["walks"], [VISION], SettingsError, "has context-loss-weight 0.3, but no text cache: the weight is"),
        (
            ["text", "walks"],
            [{"name": "main", "steps": 2}],
            SettingsError,
            "cache text is a text cache, but no stage compares embeddings on it",
        ),
    ],
)  # fmt: skip
def test_caches_of_the_wrong_kind_are_refused_in_one_line(
    tmp_path, text_folder, cache_folder, dev_teacher, t5_config, names, stages, error, said
):
    caches = {name: {"text": text_folder, "walks": cache_folder}[name] for name in names}
    with pytest.raises(error, match=re.escape(said)):
        run_stages(tmp_path / "r", caches, dev_teacher, t5_config, *stages)
    assert not (tmp_path / "r").exists()

"""A student that is not T5 trains by replay, on what its own tokenizer makes of the cache's prompts."""

import json
from pathlib import Path

import pytest

from secondcast.models.student.student import new_student
from secondcast.models.student.tokens import read_tokens
from secondcast.storage_schemas.errors import SettingsError
from secondcast.storage_schemas.reader import Cache
from secondcast.trainer.preparing.loading import load_own_tokens
from secondcast.trainer.settings import TrainFlags
from tests.models.student.encoders import make_encoder_folder
from tests.trainer.making import make_trainer
from tests.trainer.test_train import Listening, StopAfter, run_training, same_weights

FLAGS = {"dropout": 0.1, "batch_size": 8, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def roberta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With positions for 10 tokens, where the teacher of the tests has 12."""
    return make_encoder_folder(tmp_path_factory.mktemp("roberta") / "r", "roberta")


def losses(run: Path) -> list[float]:
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [entry["validation_loss"] for entry in entries if "validation_loss" in entry]


def test_its_batches_hold_its_own_tokens_of_the_prompts_of_the_rows(tmp_path, cache_folder, dev_teacher, roberta):
    trainer = make_trainer(tmp_path / "run", cache_folder, dev_teacher, roberta, timesteps_per_sample=2)
    with trainer.dataset.prefetch(trainer.plan.requests(0)) as batches:
        batch = next(batches)
    (request,) = trainer.plan.requests(0)
    cache, tokens = Cache.open(cache_folder), read_tokens(str(roberta), text_length=10)
    prompts = [trainer.dataset.prompt_of(position)[1] for position, _ in request.rows[::2]]
    assert batch.token_ids_BT.tolist() == [tokens.ids(cache.prompts[prompt].text).tolist() for prompt in prompts]
    assert batch.token_ids_BT.shape == (4, 10)


@pytest.mark.slow
def test_it_learns_on_prompts_that_it_never_saw(tmp_path, cache_folder, dev_teacher, roberta):
    heard = Listening()
    run_training(
        tmp_path / "run", cache_folder, dev_teacher, roberta, progress=heard, steps=60, checkpoint_every=10, **FLAGS
    )
    found = losses(tmp_path / "run")
    assert min(found) < 0.5 * found[0]
    assert any("has positions for 10 text tokens, but the cache's embeddings have 12" in line for line in heard.heard)


@pytest.mark.slow
def test_interrupted_and_resumed_it_ends_the_same(tmp_path, cache_folder, dev_teacher, roberta):
    run_training(tmp_path / "whole", cache_folder, dev_teacher, roberta, **FLAGS)
    with pytest.raises(KeyboardInterrupt):
        run_training(tmp_path / "cut", cache_folder, dev_teacher, roberta, progress=StopAfter(3), **FLAGS)
    run_training(tmp_path / "cut", cache_folder, dev_teacher, roberta, **FLAGS)
    assert same_weights(tmp_path / "whole", tmp_path / "cut")


def test_prompts_beside_the_vision_loss_are_refused(cache_folder, roberta):
    settings = TrainFlags.from_flags(student=str(roberta), context_loss_weight=0.5).settings()
    recorded = Cache.open(cache_folder).manifest.teacher
    student = new_student(str(roberta), recorded, init="auto", dropout=0.0, seed=0)
    with pytest.raises(SettingsError, match=f"^context-loss-weight is 0.5, but {roberta} reads prompts with its own"):
        load_own_tokens(settings, str(roberta), student)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"loss": "embedding"}, "loss is embedding"),
        ({"loss": "depth"}, "loss is depth"),
        ({"pretrain_steps": 2, "pretrain_loss": "context"}, "loss is context"),
        ({"embedding_loss_weight": 0.5}, "embedding-loss-weight is 0.5"),
    ],
)
def test_losses_that_compare_tokens_are_refused(tmp_path, cache_folder, dev_teacher, roberta, flags, said):
    with pytest.raises(SettingsError) as caught:
        run_training(tmp_path / "run", cache_folder, dev_teacher, roberta, **flags)
    assert str(caught.value) == (
        f"{said}, but {roberta} reads prompts with its own tokenizer: its embeddings are not those of T5-XXL's tokens, "
        f"position by position; start with --loss vision, which does not compare them"
    )
    assert not (tmp_path / "run").exists()

"""Arms of the experiment on text rendering differ in what their names say, at equal steps."""

from collections import Counter
from pathlib import Path

import pytest
import torch

from experiments.pocket_harness import RESULT, write_json
from experiments.pocket_text_rendering import (
    CONTEXT_STEPS,
    VISION_SIZE,
    VISION_STEPS,
    arms,
    print_table,
    quoted_tokens_weighted,
)
from secondcast.pocket.scorer import DIMENSIONS
from secondcast.pocket.training.examples import token_ids
from secondcast.trainer.data.replay_dataset import EmbeddingBatch
from secondcast.trainer.losses.objective import Objective
from secondcast.trainer.recipe import read_recipe
from secondcast.trainer.settings import TrainFlags

ARMS = {(arm.size, arm.name): arm for arm in arms(1.0)}


@pytest.mark.parametrize("key", ARMS, ids="-".join)
def test_an_arm_is_a_recipe_of_the_steps_of_its_size(key, tmp_path: Path):
    (size, name), arm = key, ARMS[key]
    (tmp_path / "r.toml").write_text(arm.recipe(tmp_path / "student"))
    stages = read_recipe(tmp_path / "r.toml").settings.stages
    steps = Counter({"context": 0, "vision": 0})
    for stage in stages:
        steps[stage.loss] += stage.steps
    assert arm.quoted_token_weight == next((number for number in (3, 10) if f"x {number}" in name), 1)
    assert steps == {"context": CONTEXT_STEPS[size], "vision": VISION_STEPS if "vision" in name else 0}
    signs = [stage.caches["sign"] / sum(stage.caches.values()) for stage in stages]
    assert signs == pytest.approx([1 / 3, 0.75] if name == "signs late" else [1 / 3] * len(stages))
    assert "vision" not in name or size == VISION_SIZE


def test_the_weight_counts_errors_of_letters_between_quotation_marks_alone():
    ids_BT = token_ids(['a red sign that says "TZF"', "a red ring"])
    teacher_BTD = torch.zeros(*ids_BT.shape, 2)
    settings = TrainFlags(student="", loss="embedding").settings()
    objective = Objective(settings=settings, backbones=[], context_ID=None, sigmas=[])
    batch = EmbeddingBatch(token_ids_BT=ids_BT, encoder_hidden_states_BTD=teacher_BTD)
    for weight, gain in ((1.0, 0), (3.0, 2 * 3), (1.0, 0)):
        with quoted_tokens_weighted(weight):
            loss = objective.training_loss(settings.stages[0], teacher_BTD + 1, batch)
        # Three letters; the root of the weight rounds.
        assert float(loss) == pytest.approx(1 + gain / ids_BT.numel(), rel=1e-5)


def test_the_table_has_text_apart_from_the_other_dimensions(tmp_path: Path, capsys):
    for seed, words in enumerate((0.2, 0.6)):
        scores = {key: {"mean": 0.9} for key in DIMENSIONS} | {"characters": {"mean": 0.4}, "words": {"mean": words}}
        result = {"size": "tiny", "name": "plain", "scores": scores, "vision_loss": 0.5}
        write_json(tmp_path / f"runs/{seed}" / RESULT, result)
    print_table(tmp_path)
    assert "| tiny | plain | 2 | 0.400 [0.300, 0.500] | 0.900 [0.900, 0.900] |" in capsys.readouterr().out

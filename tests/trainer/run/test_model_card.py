"""The card says in plain words what a student was trained with, for runs of every shape of settings."""

import pytest

from secondcast.models.families.registry import FAMILIES, licence_of
from secondcast.trainer.run.export_facts import ExportFacts
from secondcast.trainer.run.model_card import card_of, losses_text, stages_of

FACTS = ExportFacts(
    teacher="t",
    teacher_digest="a",
    sampling_digest="b",
    text_length=12,
    guidance=(2.0, 3.5),
    settings={},
    checkpoint="checkpoint-3",
    validation_loss=0.5,
    replay_error=None,
    created_by="u",
)
STAGE = {
    "name": "main",
    "loss": "vision",
    "steps": 50000,
    "batch_size": 4,
    "learning_rate": 1e-4,
    "data_order": "shuffled",
}
PRETRAIN = STAGE | {"name": "pretrain", "loss": "embedding", "steps": 20000, "learning_rate": 1e-3, "huber_delta": None}
VISION = (
    "the prediction: mean squared difference between what the frozen transformer predicts with the student's embedding "
    "and what it predicted with the teacher's, on recorded latents (the paper's loss)"
)
EMBEDDING = "embeddings: mean squared difference between the student's embedding and the teacher's"
NO_VISION = "No stage used the vision loss: the student imitates embeddings"


@pytest.mark.parametrize(
    ("stages", "expected", "imitates"),
    [
        ([STAGE], [f"1. {VISION} (50,000 steps, batch 4, learning rate 0.0001, order shuffled)"], False),
        (
            [PRETRAIN, STAGE],
            [
                f"1. {EMBEDDING} (20,000 steps, batch 4, learning rate 0.001, order shuffled)",
                f"2. {VISION} (50,000 steps, batch 4, learning rate 0.0001, order shuffled)",
            ],
            False,
        ),
        ([PRETRAIN], [f"1. {EMBEDDING} (20,000 steps, batch 4, learning rate 0.001, order shuffled)"], True),
        (
            [{"loss": "context", "steps": 9, "caches": ["a", "b"]}, {"loss": "new", "data_order": None}],
            [
                f"1. projected {EMBEDDING}, both after the transformer's own text projection "
                '(9 steps, caches ["a", "b"])',
                "2. new loss",
            ],
            False,
        ),
    ],
)
def test_stages_are_told_in_plain_words(stages, expected, imitates):
    text = losses_text(stages_of({"stages": stages}))
    assert [line for line in text.splitlines() if line[:1].isdigit()] == expected
    assert (NO_VISION in text) == imitates


def test_a_card_tells_stages_in_words_and_all_settings_in_the_table():
    stage = {"name": "main", "loss": "embedding", "steps": 3, "huber_delta": 0.5}
    facts = FACTS.model_copy(update={"settings": {"stages": [stage], "seed": 4}})
    card = card_of("diffusers", facts, text_length=12, parameters=5, weights="w")
    assert f"## Training\n\n1. {EMBEDDING} (3 steps)\n\n{NO_VISION}" in card
    assert "\n| seed | 4 |\n" in card and "\n| huber-delta | 0.5 |\n" in card and "| stages |" not in card
    assert "A T5 encoder with projection, 5 par" in card


def test_settings_that_say_nothing_of_losses_still_make_a_card():
    assert losses_text([]) == "" == losses_text(stages_of({"steps": 3})) == losses_text(stages_of({"stages": ["odd"]}))
    assert "| checkpoint | checkpoint-3 |" in card_of("distillt5", FACTS, text_length=12, parameters=5, weights="w")


@pytest.mark.parametrize(
    ("teacher", "metadata", "text"),
    [
        ("black-forest-labs/FLUX.1-schnell", "license: apache-2.0\nbase_model: black-forest-labs/FLUX.1-schnell", "ap"),
        ("me/FLUX.1-schnell-FLUX.1-dev-merged", "license: other\nlicense_name: flux-1-dev-non-commercial", "non-comm"),
        (
            "/data/flux.1-dev",
            "license: other\nlicense_name: flux-1-dev-non-commercial-license",
            "non-commercial licence",
        ),
        ("/data/flux", "tags:", "cannot name it"),
        ("pocket", "tags:", "a part of Secondcast"),
        ("/data/a/b: c", "tags:", "cannot name it"),
    ],
)
def test_a_card_has_the_licence_of_its_teacher_where_the_name_shows_it(teacher, metadata, text):
    facts = FACTS.model_copy(update={"teacher": teacher})
    card = card_of("diffusers", facts, text_length=12, parameters=5, weights="w")
    assert f"---\nlibrary_name: transformers\n{metadata}" in card
    assert text in card.split("## Licence")[1]


def test_every_supported_model_has_a_licence_with_what_the_hub_asks_for():
    for family in FAMILIES:
        for model, licence in family.licences.items():
            assert (licence.identifier == "other") == (licence.name is not None) == (licence.link is not None), model
            assert licence_of(f"{family.owner}/{model}") == (f"{family.owner}/{model}", licence)


def test_a_card_shows_a_picture_and_scores_where_there_are_some():
    words = {"text_length": 12, "parameters": 5, "weights": "w"}
    card = card_of("diffusers", FACTS, **words, picture=True, scores="| a |\n|---|\n| 1 |\n")
    assert "](samples.png)" in card and "\n## Scores\n\n| a |\n|---|\n| 1 |\n\n## Licence\n" in card
    assert "samples.png" not in (plain := card_of("diffusers", FACTS, **words)) and "## Scores" not in plain

"""The scorer gives full marks to the truth and none to what is wrong, in the dimension that is wrong."""

import numpy as np
import pytest

from secondcast.pocket.scorer import DIMENSIONS, score
from secondcast.pocket.training.pictures import render
from secondcast.pocket.world import (
    IMAGE_SIZE,
    KINDS,
    Composition,
    Landscape,
    Scene,
    Sign,
    Thing,
    caption,
    captions,
    draw_scene,
    require_scene,
)

APPLY = {
    "scene": {"colour", "shape", "binding", "spatial"},
    "sign": {"colour", "characters", "words"},
}


def thing(colour: str, shape: str) -> Thing:
    return Thing(colour=colour, shape=shape)


def seen_as(drawn: Scene, told: Scene, seed: int = 0) -> dict[str, float]:
    rng = np.random.default_rng(seed)
    return score(render(drawn, rng), caption(told, rng))


@pytest.mark.thorough
@pytest.mark.parametrize("noise", [0, 15])
@pytest.mark.parametrize("kind", KINDS)
def test_the_truth_scores_one_in_every_dimension_also_with_noise(kind: str, noise: int) -> None:
    rng = np.random.default_rng(11)
    for text in captions(150, seed=5, split="heldout", kinds=[kind]):
        image = render(require_scene(text), rng) + rng.normal(0, noise, (IMAGE_SIZE, IMAGE_SIZE, 3))
        scores = score(np.clip(image, 0, 255).astype(np.uint8), text)
        assert set(scores.values()) == {1.0}, (text, scores)
        assert set(scores) <= set(DIMENSIONS)
        assert set(scores) == APPLY.get(kind, set(scores))


PAIR = Composition(first=thing("red", "circle"), relation="left", second=thing("blue", "square"))
TWO = Composition(first=thing("green", "cross"), count=2)
LAND = Landscape(thing=thing("yellow", "ring"), place="sky", sky="night", ground="snow")
SIGN = Sign(text="ABLE".replace("E", "T"), colour="cyan")


@pytest.mark.parametrize(
    ("drawn", "told", "wrong"),
    [
        (
            Composition(first=thing("red", "square"), relation="left", second=thing("blue", "circle")),
            PAIR,
            {"binding", "spatial"},
        ),
        (Composition(first=PAIR.first, relation="right", second=PAIR.second), PAIR, {"spatial"}),
        (Composition(first=PAIR.first, relation="above", second=PAIR.second), PAIR, {"spatial"}),
        (
            Composition(first=thing("purple", "circle"), relation="left", second=thing("blue", "square")),
            PAIR,
            {"colour", "binding"},
        ),
        (
            Composition(first=thing("red", "triangle"), relation="left", second=thing("blue", "square")),
            PAIR,
            {"shape", "binding"},
        ),
        (Composition(first=TWO.first, count=3), TWO, {"count"}),
        (Composition(first=thing("green", "ring"), count=2), TWO, {"shape", "binding"}),
        (Landscape(thing=LAND.thing, place="ground", sky="night", ground="snow"), LAND, {"spatial"}),
        (Landscape(thing=LAND.thing, place="sky", sky="dusk", ground="snow"), LAND, {"colour"}),
        (Landscape(thing=LAND.thing, place="sky", sky="night", ground="sand"), LAND, {"colour"}),
        (Sign(text="ABLT", colour="red"), SIGN, {"colour"}),
    ],
)
def test_one_fault_is_zero_in_its_own_dimension_and_nowhere_else(drawn: Scene, told: Scene, wrong: set[str]) -> None:
    for seed in range(5):
        scores = seen_as(drawn, told, seed)
        assert {dimension for dimension, value in scores.items() if value == 0.0} == wrong
        assert set(scores.values()) <= {0.0, 1.0}


@pytest.mark.parametrize(
    ("drawn", "characters"), [("ABLX", 0.75), ("BALT", 0.5), ("ABL", 0.75), ("TLBA", 0.0), ("A", 0.25)]
)
def test_characters_is_the_fraction_of_letters_right_in_order(drawn: str, characters: float) -> None:
    scores = seen_as(Sign(text=drawn, colour="cyan"), SIGN)
    assert scores == {"colour": 1.0, "characters": characters, "words": 0.0}


def test_noise_scores_zero_on_every_caption() -> None:
    rng = np.random.default_rng(0)
    for text in captions(60, seed=2, split="heldout"):
        image = rng.integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
        scores = score(image, text)
        scored = {d: v for d, v in scores.items() if d in ("shape", "binding", "words")}
        assert set(scored.values()) == {0.0}, text


def test_a_blank_picture_scores_zero_on_every_composition() -> None:
    image = np.full((IMAGE_SIZE, IMAGE_SIZE, 3), 240, dtype=np.uint8)
    for text in captions(30, seed=2, split="train", kinds=["composition"]):
        assert set(score(image, text).values()) == {0.0}


def test_a_flat_picture_is_no_object_of_any_colour() -> None:
    for colour in ((128, 128, 128), (150, 60, 200), (220, 30, 40)):
        image = np.full((IMAGE_SIZE, IMAGE_SIZE, 3), colour, dtype=np.uint8)
        assert score(image, "a purple circle") == {"colour": 0.0, "shape": 0.0, "binding": 0.0, "count": 1.0}


def test_an_object_half_of_another_colour_has_no_colour() -> None:
    image = render(Composition(first=thing("red", "square")), np.random.default_rng(0))
    ys, xs = np.nonzero((image == (220, 30, 40)).all(-1))
    image[ys.min() : ys.min() + 4, xs.min() : xs.max() + 1] = (40, 70, 230)
    assert score(image, "a red square") == {"colour": 0.0, "shape": 1.0, "binding": 0.0, "count": 1.0}


def test_wrong_pictures_and_captions_are_refused() -> None:
    image = render(SIGN, np.random.default_rng(0))
    with pytest.raises(ValueError, match="found 'a cat'"):
        score(image, "a cat")
    with pytest.raises(ValueError, match=r"found a picture float64 \(24, 24, 3\)"):
        score(image / 255, "a red circle")
    with pytest.raises(ValueError, match=r"found a picture uint8 \(12, 12, 3\)"):
        score(image[::2, ::2], "a red circle")


def test_draws_of_one_kind_are_of_that_kind() -> None:
    rng = np.random.default_rng(0)
    assert {type(draw_scene(rng, split="train", kinds=["sign"])) for _ in range(20)} == {Sign}

"""Scores by prompt and by category, computed from the values of images."""

from pathlib import Path

import numpy as np
import pytest

from secondcast.evaluation.image_metrics.categories import by_category, by_prompt
from secondcast.evaluation.image_metrics.metric import Picture, Scored, mean_of
from secondcast.evaluation.intervals import bootstrap, bootstrap_average, wilson


def picture(name: str, prompt: str | None, *categories: str) -> Picture:
    return Picture(file=Path(name), name=name, prompt=prompt, categories=categories)


PICTURES = [
    picture("0", "a", "color"),
    picture("0_1", " a", "color"),
    picture("1", "b", "color", "shape"),
    picture("2", "c", "shape"),
    picture("3", "d"),
]
VALUES = {"0": 0.0, "0_1": 1.0, "1": 0.75, "2": 0.25, "3": 1.0}


def test_images_of_one_prompt_are_averaged_first():
    score = by_prompt(mean_of("vqa", VALUES, model="m", revision="r"), PICTURES)
    assert (score.mean, score.count, score.values) == (pytest.approx((0.5 + 0.75 + 0.25 + 1) / 4), 5, VALUES)
    assert (score.low, score.high) == bootstrap([0.5, 0.75, 0.25, 1.0]) and score.interval == "bootstrap"


def test_with_one_image_per_prompt_a_score_is_unchanged():
    score = mean_of("vqa", {name: VALUES[name] for name in ("0", "1", "2")}, model="m", revision="r")
    assert by_prompt(score, PICTURES) is score


def test_ten_equal_images_of_a_prompt_are_no_surer_than_one():
    rng = np.random.default_rng(0)
    many = [picture(f"{n}_{k}", f"prompt {n}") for n in range(20) for k in range(10)]
    of_prompt = rng.random(20)
    values = {image.name: of_prompt[number // 10] for number, image in enumerate(many)}
    score = by_prompt(mean_of("vqa", values, model="m", revision="r"), many)
    naive = bootstrap(list(values.values()))
    assert (score.low, score.high) == pytest.approx(bootstrap(of_prompt.tolist()), rel=1e-12)
    assert score.high - score.low > 2.5 * (naive[1] - naive[0])


def test_each_category_has_its_own_images_and_a_prompt_of_two_counts_in_both():
    found = by_category(mean_of("vqa", VALUES, model="m", revision="r"), PICTURES)
    assert {name: (score.mean, score.count) for name, score in found.items()} == {
        "color": (pytest.approx(0.625), 3),
        "shape": (pytest.approx(0.5), 2),
    }
    assert found["shape"].values == {"1": 0.75, "2": 0.25} and found["shape"].model == "m"
    assert (found["color"].low, found["color"].high) == bootstrap([0.5, 0.75])


def test_a_rate_keeps_wilsons_interval_until_prompts_have_several_images():
    rate = Scored(
        name="text-exact", mean=0.5, count=4, low=0, high=1, interval="wilson", model="m", revision="r",
        values={"0": 1.0, "1": 0.0, "2": 1.0, "0_1": 1.0},
    )  # fmt: skip
    found = by_category(rate, PICTURES)
    assert found["shape"].interval == "wilson" and (found["shape"].low, found["shape"].high) == wilson(0.5, 2)
    assert found["color"].interval == "bootstrap" and found["color"].mean == 0.5


def test_a_score_of_the_folder_alone_has_no_categories():
    fid = Scored(name="fid", mean=1.0, count=5, low=None, high=None, interval="none", model="m", revision="r")
    assert by_category(fid, PICTURES) == {} and by_prompt(fid, PICTURES) is fid


def test_the_interval_of_an_average_of_groups_is_narrower_than_that_of_either():
    rng = np.random.default_rng(1)
    groups = [rng.random(50).tolist(), (rng.random(50) + 3).tolist()]
    low, high = bootstrap_average(groups)
    assert low < np.mean(groups) < high
    # Independent groups of equal spread: the width shrinks by the square root of two; 2,000 resamples leave some 5 %.
    widths = [np.ptp(bootstrap(group)) for group in groups]
    assert high - low == pytest.approx(np.hypot(*widths) / 2, rel=0.15)
    assert bootstrap_average([[1.0], [2.0]]) is None

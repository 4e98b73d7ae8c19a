"""Recognisers on rendered signs, with the real weights of RapidOCR."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from PIL import Image

from secondcast.evaluation.image_metrics import recognisers
from secondcast.evaluation.image_metrics.characters import comparable, window_right, words_right
from secondcast.evaluation.image_metrics.recognisers import RapidOcr
from tests.evaluation.image_metrics.signs import KINDS, TEXTS, Sign, signs


@dataclass(frozen=True)
class Shown:
    """A picture that is not on disk."""

    image: Image.Image

    def pixels(self) -> Image.Image:
        return self.image


@pytest.fixture(scope="module")
def rapidocr() -> RapidOcr:
    pytest.importorskip("rapidocr")
    pytest.importorskip("onnxruntime")
    return RapidOcr()


def test_without_its_packages_rapidocr_says_what_to_install(monkeypatch):
    monkeypatch.setattr(recognisers, "find_spec", lambda name: None if name == "onnxruntime" else object())
    assert RapidOcr().absent() == (
        "--ocr rapidocr needs onnxruntime, which is not installed: pip install 'secondcast[ocr]', or give --ocr "
        "tesseract or trocr"
    )


@pytest.mark.thorough
def test_rapidocr_reads_a_sign_over_noise_and_nothing_where_nothing_is(rapidocr):
    assert rapidocr.absent() is None and "onnxruntime" in rapidocr.revision
    sign = next(sign for sign in signs("board") if sign.shown == sign.wanted)
    upright = sign.image.rotate(-90, expand=True)
    images = (sign.image, upright, Image.new("RGB", (64, 48), "white"))
    reading, turned, nothing = rapidocr.read([Shown(image) for image in images])
    assert comparable(reading) == comparable(turned) == sign.wanted and nothing == ""


def mean(rule: Callable[[str, str], float], shown: Sequence[Sign], texts: Sequence[str]) -> float:
    return float(np.mean([rule(sign.wanted, text) for sign, text in zip(shown, texts, strict=True)]))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_scores_of_rendered_signs_are_near_those_of_what_they_show(rapidocr, kind):
    shown = list(signs(kind))
    assert len(shown) == len(set(TEXTS)) == 40 and sum(comparable(s.shown) != s.wanted for s in shown) == 5
    readings = rapidocr.read([Shown(sign.image) for sign in shown])
    truth = [sign.shown for sign in shown]
    missed = [
        (sign.shown, text)
        for sign, text in zip(shown, readings, strict=True)
        if comparable(text) != comparable(sign.shown)
    ]
    # A character in fifty, a word in twenty: at most .005 and .04 were measured, in docs/evaluation.md.
    assert abs(mean(window_right, shown, readings) - mean(window_right, shown, truth)) < 0.02, missed
    assert abs(mean(words_right, shown, readings) - mean(words_right, shown, truth)) < 0.05, missed

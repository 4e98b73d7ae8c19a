"""Prompts without file names belong to pictures in the order that people give numbers, and that order is printed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from secondcast.evaluation.image_metrics.pictures import PictureText, natural_key, read_pictures
from tests.evaluation.image_metrics.test_cli_images import images

NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@pytest.fixture
def numbered(tmp_path):
    (tmp_path / "p").mkdir()
    for number in range(13):
        Image.new("RGB", (20, 20), (number, 0, 0)).save(tmp_path / f"p/{number}.png")
    (tmp_path / "prompts.txt").write_text("".join(f"prompt of {number}\n" for number in range(13)))
    return tmp_path


def test_the_tenth_picture_has_the_tenth_prompt(numbered):
    found = read_pictures(numbered / "p", [PictureText(prompt=f"prompt of {number}") for number in range(13)])
    assert [(p.name, p.prompt, p.pixels().getpixel((0, 0))[0]) for p in found] == [
        (f"{number}.png", f"prompt of {number}", number) for number in range(13)
    ]


@given(numbers=st.sets(st.integers(0, 10**6), min_size=1), zeros=st.data())
def test_numbers_are_ordered_as_numbers_whatever_zeros_they_begin_with(numbers, zeros):
    names = {f"img-{'0' * zeros.draw(st.integers(0, 3))}{number}_b.png": number for number in numbers}
    assert [names[name] for name in sorted(names, key=natural_key)] == sorted(numbers)


@given(names=st.lists(NAMES))
def test_any_names_have_one_order(names):
    ordered = sorted(names, key=natural_key)
    assert ordered == sorted(reversed(names), key=natural_key)
    assert all(natural_key(one) != natural_key(other) for one in names for other in names if one != other)


def test_the_pairing_is_printed_before_anything_is_scored(clip, numbered, capsys):
    words = [numbered / "p", "--prompts", numbered / "prompts.txt", "--metrics", "clip-score", "--clip-model", clip]
    code, _, heard = images(*words, capsys=capsys)
    assert code == 0
    assert heard.splitlines()[:14] == [
        f"{numbered}/p: prompts are matched to images in the order of their names; to change it, give `file` in JSON "
        f"lines",
        *(f"  {number}.png: prompt of {number}" for number in range(11)),
        "  (1 more image)",
        "  12.png: prompt of 12",
    ]
    assert "prompt of" not in images(*words, "--quiet", capsys=capsys)[2]


def test_nothing_is_said_of_pictures_that_are_named(clip, numbered, capsys):
    (numbered / "prompts.jsonl").write_text('{"prompt": "the second", "file": "1.png"}\n')
    words = [numbered / "p", "--prompts", numbered / "prompts.jsonl", "--metrics", "clip-score", "--clip-model", clip]
    code, _, heard = images(*words, capsys=capsys)
    assert code == 0 and "the second" not in heard and "order of their names" not in heard

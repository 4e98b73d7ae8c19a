"""A picture is scored as a viewer shows it, whatever its file holds: bits, grey, palettes, alpha, inks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from secondcast.evaluation.image_metrics.metric import Picture

RAMP_HW = np.arange(256, dtype=np.uint8).reshape(16, 16)


def read_back(image: Image.Image, folder, name="a.png") -> np.ndarray:
    image.save(folder / name)
    return np.asarray(Picture(file=folder / name, name=name).pixels())


def grey(values_HW) -> np.ndarray:
    return np.repeat(np.asarray(values_HW, dtype=np.uint8)[..., None], 3, axis=2)


def test_sixteen_bits_of_grey_keep_their_shades(tmp_path):
    values = RAMP_HW.astype(np.uint16) * 257
    assert Image.fromarray(values).mode == "I;16"
    assert np.array_equal(read_back(Image.fromarray(values), tmp_path), grey(RAMP_HW))
    # As Pillow reads 16 bits of colour: the high byte.
    assert np.array_equal(read_back(Image.fromarray(values | 0xFF), tmp_path), grey(RAMP_HW))


@pytest.mark.parametrize(
    ("mode", "make", "expected"),
    [
        ("L", lambda: Image.fromarray(RAMP_HW), grey(RAMP_HW)),
        ("1", lambda: Image.fromarray(RAMP_HW > 127), grey((RAMP_HW > 127) * 255)),
        ("RGB", lambda: Image.fromarray(grey(RAMP_HW)), grey(RAMP_HW)),
        ("P", lambda: Image.fromarray(RAMP_HW).convert("P"), grey(RAMP_HW)),
    ],
)
def test_an_opaque_picture_is_what_its_pixels_say(tmp_path, mode, make, expected):
    image = make()
    assert image.mode == mode
    assert np.array_equal(read_back(image, tmp_path), expected)


@settings(max_examples=30, deadline=None)
@given(colour=st.tuples(*[st.integers(0, 255)] * 3), alpha=st.integers(0, 255))
def test_what_is_transparent_is_seen_on_white(tmp_path_factory, colour, alpha):
    folder = tmp_path_factory.mktemp("p")
    on_white = np.array([round(c * alpha / 255 + 255 - alpha) for c in colour])
    found = read_back(Image.new("RGBA", (3, 2), (*colour, alpha)), folder)
    assert np.abs(found.astype(int) - on_white).max() <= 1
    if alpha == 255:
        assert np.array_equal(found[0, 0], colour)
    found = read_back(Image.new("LA", (3, 2), (colour[0], alpha)), folder)
    assert np.abs(found.astype(int) - on_white[0]).max() <= 1


@pytest.mark.parametrize("mode", ["P", "L", "RGB"])
def test_a_transparent_colour_is_white_and_the_others_stay(tmp_path, mode):
    image = Image.new("RGB", (2, 1), (0, 0, 0))
    image.putpixel((1, 0), (200, 200, 200))
    image = image.quantize(2) if mode == "P" else image.convert(mode)
    hidden = image.getpixel((0, 0))
    image.save(tmp_path / "a.png", transparency=hidden)
    found = np.asarray(Picture(file=tmp_path / "a.png", name="a.png").pixels())
    assert found[0].tolist() == [[255] * 3, [200] * 3]


def test_inks_of_a_jpeg_become_their_colours(tmp_path):
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    found = read_back(image, tmp_path, "a.jpg")
    assert np.abs(found.astype(int) - [255, 0, 0]).max() <= 3

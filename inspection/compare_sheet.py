"""The sheet of `inspect compare`: teacher, students, amplified differences, errors by step."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from evaluation.closed_loop import RECORDED
from evaluation.picture import enlarged
from inspection.compare import Compared
from inspection.compare_text import distance_text
from inspection.sheet import COLOURS, GREY, LINE, amplified_difference, font, lines_of, plot_curves, stacked
from storage_schemas.fields import Array

_SIDE, _GAP, _MARGIN, _PLOT_WIDTH = 128, 6, 12, 180
_TITLE_FONT, _SMALL_FONT = 13, 11
_FACTORS = (1, 2, 4, 8, 16, 32)


def comparison_sheet(compared: Compared, facts: dict[str, Any]) -> Image.Image:
    """A strip for each trajectory, one below the other, below a head that says what is seen."""
    factor = difference_factor(compared)
    columns = 1 + 2 * len(compared.led)
    width = 2 * _MARGIN + columns * (_SIDE + _GAP) + _PLOT_WIDTH
    top = max(value for row in facts["trajectories"] for value in _highest(row))
    head = _head(compared, width, factor, top)
    return stacked(
        [head, *(_strip(compared, facts, row, width, factor, top) for row in range(len(compared.trajectories)))]
    )


def _highest(row: dict[str, Any]) -> list[float]:
    return [max(found["error_fraction_by_step"]) for found in row["students"].values()]


def difference_factor(compared: Compared) -> int:
    """The largest factor at which at most one value in ten of all differences is cut; the same for all."""
    differences = [
        np.abs(picture.astype(np.int32) - recorded.astype(np.int32)).ravel()
        for name in compared.led
        for picture, recorded in zip(compared.pictures[name], compared.pictures[RECORDED], strict=True)
    ]
    high = float(np.percentile(np.concatenate(differences), 90))
    return max(factor for factor in _FACTORS if factor == 1 or factor * high <= 255)


def _head(compared: Compared, width: int, factor: int, top: float) -> Image.Image:
    sampling = compared.cache.manifest.sampling
    text = (
        f"{compared.cache.location}: final pictures from the cached noise, {sampling.steps} steps. Difference: "
        f"absolute, of the student's picture from the teacher's, times {factor}. Curves: error of the prediction by "
        f"step on the cached latents, from 0 to {100 * top:.0f} % of the velocity's norm."
    )
    lines = lines_of(text, width - 2 * _MARGIN, _TITLE_FONT)
    head = Image.new("RGB", (width, 2 * _MARGIN + LINE * (len(lines) + 1)), "white")
    draw = ImageDraw.Draw(head)
    for number, line in enumerate(lines):
        draw.text((_MARGIN, _MARGIN + LINE * number), line, fill="black", font=font(_TITLE_FONT))
    across = _MARGIN
    for number, name in enumerate(compared.led):
        colour = COLOURS[number % len(COLOURS)]
        place = (across, _MARGIN + LINE * len(lines) + 2)
        draw.text(place, name, fill=colour, font=font(_TITLE_FONT))
        across += int(font(_TITLE_FONT).getlength(name)) + 16
    return head


def _strip(compared: Compared, facts: dict[str, Any], row: int, width: int, factor: int, top: float) -> Image.Image:
    found = facts["trajectories"][row]
    guidance = "" if found["guidance"] is None else f", guidance {found['guidance']:g}"
    held_out = "" if found["held_out"] else ", not held out"
    titles = lines_of(
        f"{found['index']}: {found['prompt']}{guidance}{held_out}", width - 2 * _MARGIN, _TITLE_FONT
    )  # fmt: skip
    names = [[line for line in lines_of(name, _SIDE, _SMALL_FONT)] for name in compared.led]
    name_lines = max(map(len, names))
    pictures_top = LINE * (len(titles) + name_lines) + 6
    strip = Image.new("RGB", (width, pictures_top + _SIDE + LINE + 14), "white")
    draw = ImageDraw.Draw(strip)
    for number, line in enumerate(titles):
        draw.text((_MARGIN, 2 + LINE * number), line, fill="black", font=font(_TITLE_FONT))
    recorded_HWC = compared.pictures[RECORDED][row]
    cells: list[tuple[list[str], str, str, Array]] = [(["teacher"], GREY, "", recorded_HWC)]
    for number, name in enumerate(compared.led):
        picture_HWC = compared.pictures[name][row]
        colour = COLOURS[number % len(COLOURS)]
        cells.append((names[number], colour, distance_text(found["students"][name]), picture_HWC))
        difference_HWC = amplified_difference(picture_HWC, recorded_HWC, factor)
        cells.append(([f"difference x {factor}"], GREY, "", difference_HWC))
    for column, cell in enumerate(cells):
        _paste(strip, draw, cell, _MARGIN + column * (_SIDE + _GAP), pictures_top, name_lines)
    left = _MARGIN + len(cells) * (_SIDE + _GAP) + _GAP
    curves = [found["students"][name]["error_fraction_by_step"] for name in compared.led]
    _plot(draw, curves, (left, pictures_top, width - _MARGIN, pictures_top + _SIDE - 1), top)
    return strip


def _paste(
    strip: Image.Image,
    draw: ImageDraw.ImageDraw,
    cell: tuple[list[str], str, str, Array],
    left: int,
    top: int,
    name_lines: int,
) -> None:
    lines, colour, below, picture_HWC = cell
    for number, line in enumerate(lines):
        place = (left, top - 4 - LINE * (len(lines) - number))
        draw.text(place, line, fill=colour, font=font(_SMALL_FONT))
    picture = enlarged(picture_HWC, _SIDE)
    strip.paste(picture, (left, top))
    if below and below != "identical":
        psnr, ssim = below.split(" / ")
        below = f"{psnr} dB, SSIM {ssim}"
    draw.text((left, top + _SIDE + 3), below, fill=GREY, font=font(_SMALL_FONT))


def _plot(
    draw: ImageDraw.ImageDraw, curves: Sequence[Sequence[float]], box: tuple[int, int, int, int], top: float
) -> None:
    left, upper, right, lower = box
    plot_curves(draw, curves, box, top=top)
    draw.text((left, upper - 16), f"error by step, 0 to {100 * top:.0f} %", fill=GREY, font=font(_SMALL_FONT))
    draw.text((left, lower + 4), "0", fill=GREY, font=font(_SMALL_FONT))
    last = str(len(curves[0]) - 1)
    draw.text((right - font(_SMALL_FONT).getlength(last), lower + 4), last, fill=GREY, font=font(_SMALL_FONT))

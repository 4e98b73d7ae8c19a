"""The sheet of `inspect compare`: teacher, students, amplified differences, errors by step."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from secondcast.evaluation.closed_loop import RECORDED
from secondcast.evaluation.pictures.picture import enlarged
from secondcast.inspection.compare import Compared
from secondcast.inspection.sheet import (
    COLOURS,
    GREY,
    LINE,
    amplified_difference,
    font,
    lines_of,
    picture_side,
    plot_curves,
    stacked,
)
from secondcast.storage_schemas.progress import counted
from secondcast.storage_schemas.schema.fields import Array

_LARGEST_SIDE, _GAP, _MARGIN, _PLOT_WIDTH = 256, 6, 12, 180
_TITLE_FONT, _SMALL_FONT = 13, 11
_FACTORS = (1, 2, 4, 8, 16, 32)


def comparison_sheet(compared: Compared, facts: dict[str, Any]) -> Image.Image:
    """Draw a strip for each trajectory below a header that explains the sheet."""
    sampling = compared.cache.manifest.sampling
    sheet = _Sheet(
        compared=compared,
        rows=facts["trajectories"],
        side=picture_side(max(sampling.height, sampling.width), largest=_LARGEST_SIDE),
        factor=difference_factor(compared),
        top=max(
            value
            for row in facts["trajectories"]
            for found in row["students"].values()
            for value in found["error_fraction_by_step"]
        ),
    )
    return stacked([sheet.head(), *(sheet.strip(row) for row in range(len(compared.trajectories)))])


def difference_factor(compared: Compared) -> int:
    """The largest factor at which at most one in ten of all difference values is clipped; the same for all images."""
    differences = [
        np.abs(picture.astype(np.int32) - recorded.astype(np.int32)).ravel()
        for name in compared.results
        for picture, recorded in zip(compared.pictures[name], compared.pictures[RECORDED], strict=True)
    ]
    high = float(np.percentile(np.concatenate(differences), 90, method="lower"))
    return max(factor for factor in _FACTORS if factor == 1 or factor * high <= 255)


@dataclass(frozen=True, kw_only=True)
class _Cell:
    """An image with the text above and below it."""

    name: str
    colour: str
    below: str
    picture_HWC: Array


@dataclass(frozen=True, kw_only=True)
class _Sheet:
    """rows: the facts of the trajectories. top: the error at the upper edge of all plots."""

    compared: Compared
    rows: Sequence[dict[str, Any]]
    side: int
    factor: int
    top: float

    @property
    def width(self) -> int:
        return 2 * _MARGIN + (1 + 2 * len(self.compared.results)) * (self.side + _GAP) + _PLOT_WIDTH

    def head(self) -> Image.Image:
        """Draw the header."""
        text = (
            f"{self.compared.cache.location}: final images from the cached noise, "
            f"{counted(self.compared.cache.manifest.sampling.steps, 'step')}. Difference: absolute difference between "
            f"the student's and the teacher's image, times {self.factor}. Curves, in the colours of the names: error "
            f"of the prediction by step on the cached latents, from 0 to {100 * self.top:.0f} % of the velocity's norm."
        )
        lines = lines_of(text, self.width - 2 * _MARGIN, _TITLE_FONT)
        head = Image.new("RGB", (self.width, 2 * _MARGIN + LINE * len(lines)), "white")
        _write(ImageDraw.Draw(head), lines, (_MARGIN, _MARGIN), "black", _TITLE_FONT)
        return head

    def strip(self, row: int) -> Image.Image:
        """Draw one trajectory."""
        cells = self._cells(row)
        titles = lines_of(_title(self.rows[row]), self.width - 2 * _MARGIN, _TITLE_FONT)
        names = [lines_of(cell.name, self.side, _SMALL_FONT) for cell in cells]
        top = 2 + LINE * len(titles) + LINE * max(map(len, names)) + 2
        strip = Image.new("RGB", (self.width, top + self.side + LINE + 14), "white")
        draw = ImageDraw.Draw(strip)
        _write(draw, titles, (_MARGIN, 2), "black", _TITLE_FONT)
        for column, (cell, lines) in enumerate(zip(cells, names, strict=True)):
            left = _MARGIN + column * (self.side + _GAP)
            _write(draw, lines, (left, top - 2 - LINE * len(lines)), cell.colour, _SMALL_FONT)
            strip.paste(enlarged(cell.picture_HWC, self.side), (left, top))
            _write(draw, [cell.below], (left, top + self.side + 3), GREY, _SMALL_FONT)
        self._plot(draw, row, _MARGIN + len(cells) * (self.side + _GAP) + _GAP, top)
        return strip

    def _cells(self, row: int) -> list[_Cell]:
        recorded_HWC = self.compared.pictures[RECORDED][row]
        cells = [_Cell(name="teacher", colour=GREY, below="", picture_HWC=recorded_HWC)]
        for number, (name, found) in enumerate(self.rows[row]["students"].items()):
            picture_HWC = self.compared.pictures[name][row]
            distance = f"{found['psnr_db'] or 0:.2f} dB, SSIM {found['ssim']:.3f}"
            below = "identical" if found["psnr_db"] is None else distance
            cells.append(_Cell(name=name, colour=COLOURS[number % len(COLOURS)], below=below, picture_HWC=picture_HWC))
            difference_HWC = amplified_difference(picture_HWC, recorded_HWC, self.factor)
            cells.append(_Cell(name=f"difference x {self.factor}", colour=GREY, below="", picture_HWC=difference_HWC))
        return cells

    def _plot(self, draw: ImageDraw.ImageDraw, row: int, left: int, upper: int) -> None:
        right, lower = self.width - _MARGIN, upper + self.side - 1
        curves = [found["error_fraction_by_step"] for found in self.rows[row]["students"].values()]
        plot_curves(draw, curves, (left, upper, right, lower), top=self.top)
        _write(draw, [f"error by step, 0 to {100 * self.top:.0f} %"], (left, upper - 18), GREY, _SMALL_FONT)
        _write(draw, ["0"], (left, lower + 4), GREY, _SMALL_FONT)
        last = str(len(curves[0]) - 1)
        _write(draw, [last], (right - int(font(_SMALL_FONT).getlength(last)), lower + 4), GREY, _SMALL_FONT)


def _title(found: dict[str, Any]) -> str:
    guidance = "" if found["guidance"] is None else f", guidance {found['guidance']:g}"
    return f"{found['index']}: {found['prompt']}{guidance}" + ("" if found["held_out"] else ", not held out")


def _write(draw: ImageDraw.ImageDraw, lines: Sequence[str], place: tuple[int, int], colour: str, size: int) -> None:
    for number, line in enumerate(lines):
        draw.text((place[0], place[1] + LINE * number), line, fill=colour, font=font(size))

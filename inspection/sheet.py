"""Drawing of image sheets: wrapped text, stacked strips, curves by step."""

from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

from secondcast.evaluation.pictures.picture import enlarged
from secondcast.storage_schemas.schema.fields import Array

GREY = "#555555"
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf")
LINE = 16
_SMALLEST_SIDE, _GAP, _MARGIN = 128, 6, 12
_TITLE_FONT, _SMALL_FONT = 13, 11


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font."""
    return ImageFont.load_default(size=size)


def lines_of(text: str, width: int, size: int) -> list[str]:
    """Wrap a text to lines of at most `width` pixels, splitting longer words."""
    measure = font(size).getlength
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if measure(longer) <= width:
            lines[-1] = longer
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if lines[-1] and measure(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return lines


def picture_side(pixels: int, *, largest: int) -> int:
    """Side of a picture on a sheet; small pictures are enlarged by an integer factor, without smoothing."""
    if pixels < _SMALLEST_SIDE:
        return pixels * (_SMALLEST_SIDE // pixels)
    return min(pixels, largest)


def labelled_strip(title: str, pictures: Mapping[str, Array], side: int) -> Image.Image:
    """Draw pictures side by side, each below its name, under a title; side: of each picture in pixels."""
    width = 2 * _MARGIN + len(pictures) * (side + _GAP) - _GAP
    lines = lines_of(title, width - 2 * _MARGIN, _TITLE_FONT)
    top = _GAP + LINE * (len(lines) + 1)
    strip = Image.new("RGB", (width, top + side + _MARGIN), "white")
    draw = ImageDraw.Draw(strip)
    for number, line in enumerate(lines):
        draw.text((_MARGIN, _GAP + LINE * number), line, fill="black", font=font(_TITLE_FONT))
    for column, (name, picture_HWC) in enumerate(pictures.items()):
        left = _MARGIN + column * (side + _GAP)
        draw.text((left, top - LINE), name, fill=GREY, font=font(_SMALL_FONT))
        strip.paste(enlarged(picture_HWC, side), (left, top))
    return strip


def stacked(strips: Sequence[Image.Image]) -> Image.Image:
    """Stack images vertically on white."""
    sheet = Image.new("RGB", (max(strip.width for strip in strips), sum(strip.height for strip in strips)), "white")
    top = 0
    for strip in strips:
        sheet.paste(strip, (0, top))
        top += strip.height
    return sheet


def plot_curves(
    draw: ImageDraw.ImageDraw, curves: Sequence[Sequence[float]], box: tuple[int, int, int, int], *, top: float
) -> None:
    """Draw curves over the steps in a box (left, upper, right, lower), from 0 to `top`, cycling through the colours."""
    left, upper, right, lower = box
    draw.rectangle(box, outline="#cccccc")
    for number, values in enumerate(curves):
        across = (right - left) / max(1, len(values) - 1)
        points = [
            (left + place * across, lower - min(1.0, value / top if top else 0.0) * (lower - upper))
            for place, value in enumerate(values)
        ]
        colour = COLOURS[number % len(COLOURS)]
        if len(points) == 1:
            points.append((right, points[0][1]))
        draw.line(points, fill=colour, width=2)


def amplified_difference(a_HWC: Array, b_HWC: Array, factor: int) -> Array:
    """uint8 absolute difference of two uint8 images, times a factor, clipped at 255."""
    difference = abs(a_HWC.astype("int32") - b_HWC.astype("int32"))
    picture: Array = (difference * factor).clip(0, 255).astype("uint8")
    return picture

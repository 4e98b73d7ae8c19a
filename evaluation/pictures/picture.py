"""Grids of results: the same captions by several text encoders, side by side."""

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from secondcast.storage_schemas.schema.fields import Array

_SIDE = 96
_GAP = 6
_MARGIN = 14
_TEXT_HEIGHT = 44
_COLUMNS = 3


def side_by_side(names: Sequence[str], images: Sequence[Array], captions: Sequence[str]) -> Image.Image:
    """Draw one grid: for each caption the image of each encoder, labelled, with the caption below.

    images: one uint8 array [N, H, W, 3] per name; captions: N texts.
    """
    cell_width = len(names) * (_SIDE + _GAP) + _MARGIN
    cell_height = _SIDE + _TEXT_HEIGHT + 20
    rows = -(-len(captions) // _COLUMNS)
    columns = min(_COLUMNS, len(captions))
    sheet = Image.new("RGB", (columns * cell_width + _MARGIN, rows * cell_height + _MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    font, small = ImageFont.load_default(size=12), ImageFont.load_default(size=11)
    for number, caption in enumerate(captions):
        left = _MARGIN + (number % _COLUMNS) * cell_width
        top = _MARGIN + (number // _COLUMNS) * cell_height
        for column, (name, stack) in enumerate(zip(names, images, strict=True)):
            x = left + column * (_SIDE + _GAP)
            draw.text((x, top - 2), name, fill="#555555", font=small)
            sheet.paste(enlarged(stack[number], _SIDE), (x, top + 14))
        wrapped = "\n".join(textwrap.wrap(caption, width=50)[:2])
        draw.multiline_text((left, top + _SIDE + 18), wrapped, fill="black", font=font)
    return sheet


def enlarged(image_HWC: Array, side: int) -> Image.Image:
    """Fit an image into a square of a given side, padded with white; small images are enlarged without smoothing."""
    picture = Image.fromarray(image_HWC)
    scale = side / max(picture.size)
    width, height = (max(1, round(pixels * scale)) for pixels in picture.size)
    resized = picture.resize((width, height), Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)
    if width == height:
        return resized
    square = Image.new("RGB", (side, side), "white")
    square.paste(resized, ((side - width) // 2, (side - height) // 2))
    return square

"""Pictures of signs with a known text, in fonts of matplotlib."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFont

TEXTS = (
    *(
        "open daily",
        "no parking",
        "fresh bread",
        "army exit",
        "mind the gap",
        "platform 9",
        "please knock",
        "wet paint",
    ),
    *("book fair", "sale today", "keep left", "bus stop", "hot coffee", "free entry", "do not touch", "lost cat"),
    *("speed limit 30", "grand opening", "i remember", "the end", "closed on monday", "room 204", "flower shop"),
    *("quiet please", "live music", "happy birthday", "winter is here", "tea time", "emergency door", "north gate"),
    *("school zone", "self service", "garden path", "city library", "ticket office", "beware of dog", "good morning"),
    *("welcome home", "staff only", "pull to open"),
)
FONTS = (
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSerif", "DejaVuSerif-Bold"),
    *("STIXGeneral", "STIXGeneralBol"),
)
KINDS = ("plain", "board", "turned", "small", "low contrast")
_MISSPELT = 8
_SIDE = 384


@dataclass(frozen=True, kw_only=True)
class Sign:
    """wanted: the text that was asked for; shown: the text in the picture."""

    wanted: str
    shown: str
    image: Image.Image


def signs(kind: str) -> Iterator[Sign]:
    """A sign for each text, one in eight misspelt on purpose."""
    draw = np.random.default_rng(KINDS.index(kind))
    for number, wanted in enumerate(TEXTS):
        shown = _misspelt(wanted, draw) if number % _MISSPELT == 0 else wanted
        shown = (shown, shown.upper(), shown.title())[number % 3]
        yield Sign(wanted=wanted, shown=shown, image=_image(shown, FONTS[number % len(FONTS)], kind, draw))


def _misspelt(text: str, draw: np.random.Generator) -> str:
    """Two letters of a word exchanged, or one doubled."""
    places = [at for at in range(len(text) - 1) if text[at].isalpha() and text[at + 1].isalpha()]
    at = int(draw.choice([at for at in places if text[at] != text[at + 1]]))
    if draw.random() < 0.5:
        return text[:at] + text[at + 1] + text[at] + text[at + 2 :]
    return text[: at + 1] + text[at:]


def _image(text: str, name: str, kind: str, draw: np.random.Generator) -> Image.Image:
    size = 20 if kind == "small" else 40
    font = ImageFont.truetype(str(Path(get_data_path()) / f"fonts/ttf/{name}.ttf"), size)
    left, top, right, bottom = font.getbbox(text)
    while right - left > _SIDE - 40:
        size -= 2
        font = font.font_variant(size=size)
        left, top, right, bottom = font.getbbox(text)
    wide, high = int(right - left), int(bottom - top)
    board = Image.new("RGB", (wide + 24, high + 24), _colour(kind))
    ink = (150, 150, 150) if kind == "low contrast" else tuple(int(value) for value in draw.integers(0, 70, 3))
    ImageDraw.Draw(board).text((12 - left, 12 - top), text, fill=ink, font=font)
    if kind in ("plain", "low contrast"):
        ground = Image.new("RGB", (_SIDE, _SIDE), _colour(kind))
    else:
        noise_HWC = draw.integers(0, 256, (_SIDE // 8, _SIDE // 8, 3), dtype=np.uint8)
        ground = Image.fromarray(noise_HWC).resize((_SIDE, _SIDE), Image.Resampling.BICUBIC)
    mask = Image.new("L", board.size, 255)
    if kind == "turned":
        angle = float(draw.uniform(8, 12)) * (1 if draw.random() < 0.5 else -1)
        board, mask = (one.rotate(angle, Image.Resampling.BICUBIC, expand=True) for one in (board, mask))
    spare = [_SIDE - side for side in board.size]
    place = tuple(int(draw.integers(0, max(1, rest))) for rest in spare)
    ground.paste(board, place, mask)
    return ground


def _colour(kind: str) -> tuple[int, int, int]:
    return (200, 200, 200) if kind == "low contrast" else (245, 245, 240)

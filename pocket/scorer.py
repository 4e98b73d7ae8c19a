"""The exact scorer of the pocket world: what a picture shows, against what its caption says.

Objects are connected regions of pixels that are not background; a region's shape is the template that overlaps
it best, its colour that of most of its pixels. A sign is the board that fits best over all places and lengths, and
its letters are read off at their places on it.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from secondcast.pocket.lexicon import (
    COLOURS,
    GLYPHS,
    GROUNDS,
    HORIZON,
    INK,
    LONGEST_TEXT,
    PAPER,
    SHAPE_SIZE,
    SHAPES,
    SKIES,
)
from secondcast.pocket.world import IMAGE_SIZE, Composition, Landscape, Sign, Thing, bitmap, require_scene

DIMENSIONS: tuple[str, ...] = ("colour", "shape", "binding", "count", "spatial", "characters", "words")
"""colour, shape, binding, count, spatial, words: 0.0 or 1.0; characters: fraction of letters right in order."""

SMALLEST_OBJECT: int = 8
LARGEST_OBJECT: int = 64
"""Pixels of a region that can be one object: a larger one, such as a flat picture, has no colour."""
LEAST_OVERLAP: float = 0.7
LEAST_PURITY: float = 0.7
WRONG_DOTS_ALLOWED: int = 2

_Image = npt.NDArray[np.uint8]
_Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Found:
    """An object seen in a picture; colour or shape is None if not of this world; centre (y, x) in pixels."""

    colour: str | None
    shape: str | None
    centre: tuple[float, float]


def _nearest(image: _Image, palette: list[tuple[int, int, int]]) -> npt.NDArray[np.intp]:
    """Index of the nearest palette colour of each pixel: [H, W]."""
    distance = image[:, :, None, :].astype(np.int64) - np.array(palette, dtype=np.int64)
    labels: npt.NDArray[np.intp] = (distance**2).sum(axis=-1).argmin(axis=-1)
    return labels


def _regions(mask: _Mask) -> list[_Mask]:
    """Connected regions (four neighbours) of at least SMALLEST_OBJECT pixels."""
    left = mask.copy()
    found: list[_Mask] = []
    while left.any():
        region = np.zeros_like(mask)
        region[np.unravel_index(int(left.argmax()), left.shape)] = True
        size = 0
        while size != region.sum():
            size = int(region.sum())
            grown = region.copy()
            grown[1:] |= region[:-1]
            grown[:-1] |= region[1:]
            grown[:, 1:] |= region[:, :-1]
            grown[:, :-1] |= region[:, 1:]
            region = grown & left
        left &= ~region
        if size >= SMALLEST_OBJECT:
            found.append(region)
    return found


def _shape_of(region: _Mask) -> str | None:
    """The shape whose template overlaps the region best by joint area, None below LEAST_OVERLAP."""
    best, name = LEAST_OVERLAP, None
    padded = np.pad(region, SHAPE_SIZE)
    ys, xs = np.nonzero(padded)
    for shape, rows in SHAPES.items():
        template = bitmap(rows)
        for top in range(ys.min() - 1, ys.min() + 2):
            for left in range(xs.min() - 1, xs.min() + 2):
                window = padded[top : top + SHAPE_SIZE, left : left + SHAPE_SIZE]
                shared = int((window & template).sum())
                overlap = shared / (len(ys) + int(template.sum()) - shared)
                if overlap > best:
                    best, name = overlap, shape
    return name


def find_objects(image: _Image, background: _Image) -> list[Found]:
    """The objects of a picture whose background, uint8 [H, W, 3] of plain colours, is known."""
    plain = [tuple(map(int, colour)) for colour in np.unique(background.reshape(-1, 3), axis=0)]
    labels = _nearest(image, [*COLOURS.values(), *plain])  # type: ignore[list-item]
    found = []
    for region in _regions(labels < len(COLOURS)):
        counts = np.bincount(labels[region], minlength=len(COLOURS))
        pure = counts.max() >= LEAST_PURITY * region.sum() and region.sum() <= LARGEST_OBJECT
        ys, xs = np.nonzero(region)
        colour = tuple(COLOURS)[int(counts.argmax())] if pure else None
        found.append(Found(colour=colour, shape=_shape_of(region), centre=(float(ys.mean()), float(xs.mean()))))
    return found


def _agree(found: list[Found], expected: list[Thing]) -> dict[str, float]:
    """Colour, shape and binding: the same ones, as often."""
    seen, told = ([(one.colour, one.shape) for one in things] for things in (found, expected))
    return {
        "colour": float(Counter(colour for colour, _ in seen) == Counter(colour for colour, _ in told)),
        "shape": float(Counter(shape for _, shape in seen) == Counter(shape for _, shape in told)),
        "binding": float(Counter(seen) == Counter(told)),
    }


def _related(found: list[Found], first: Thing, relation: str, second: Thing) -> bool:
    """Whether two objects can be told apart as first and second, in the relation along the longer axis."""
    if len(found) != 2:
        return False

    def likeness(a: Found, b: Found) -> int:
        return sum(
            (
                a.colour == first.colour,
                a.shape == first.shape,
                b.colour == second.colour,
                b.shape == second.shape,
            )
        )

    one, two = found
    if likeness(one, two) == likeness(two, one):
        return False
    a, b = (one, two) if likeness(one, two) > likeness(two, one) else (two, one)
    dy, dx = b.centre[0] - a.centre[0], b.centre[1] - a.centre[1]
    seen = ("left" if dx > 0 else "right") if abs(dx) > abs(dy) else ("above" if dy > 0 else "below")
    return seen == relation


def _score_landscape(image: _Image, scene: Landscape) -> dict[str, float]:
    skies = np.bincount(_nearest(image[: HORIZON - 1], [*SKIES.values(), *COLOURS.values()]).ravel(), minlength=9)
    grounds = np.bincount(_nearest(image[HORIZON + 1 :], [*GROUNDS.values(), *COLOURS.values()]).ravel(), minlength=10)
    sky, ground = int(skies.argmax()), int(grounds.argmax())
    known = sky < len(SKIES) and ground < len(GROUNDS)
    background = np.zeros_like(image)
    if known:
        background[:HORIZON], background[HORIZON:] = (
            tuple(SKIES.values())[sky],
            tuple(GROUNDS.values())[ground],
        )
    found = find_objects(image, background)
    scores = _agree(found, [scene.thing])
    right = known and tuple(SKIES)[sky] == scene.sky and tuple(GROUNDS)[ground] == scene.ground
    high = len(found) == 1 and found[0].centre[0] < HORIZON - 0.5
    placed = len(found) == 1 and high == (scene.place == "sky")
    return scores | {"colour": scores["colour"] * right, "spatial": float(placed)}


def _score_composition(image: _Image, scene: Composition) -> dict[str, float]:
    found = find_objects(image, np.full_like(image, PAPER))
    if scene.second is None or scene.relation is None:
        # How many there are is count's business: the rest asks only that all be of one kind.
        return _agree(found, [scene.first] * max(1, len(found))) | {"count": float(len(found) == scene.count)}
    related = float(_related(found, scene.first, scene.relation, scene.second))
    return _agree(found, [scene.first, scene.second]) | {"count": float(len(found) == 2), "spatial": related}


def read_sign(image: _Image) -> tuple[str | None, str]:
    """The colour of the board in a picture and the letters on it, `?` for one that is none of the world's."""
    labels = _nearest(image, [*COLOURS.values(), INK, PAPER])
    board: _Mask = labels <= len(COLOURS)
    counts = np.bincount(labels[labels < len(COLOURS)], minlength=len(COLOURS))
    colour = tuple(COLOURS)[int(counts.argmax())] if counts.max() >= LEAST_PURITY * max(1, counts.sum()) else None
    total = board.cumsum(0).cumsum(1)
    total = np.pad(total, ((1, 0), (1, 0)))
    places = [
        (2 * int(inside) - 9 * width, length, top, left)
        for length in range(1, LONGEST_TEXT + 1)
        for width in (4 * length + 3,)
        for top in range(IMAGE_SIZE - 9 + 1)
        for left in range(IMAGE_SIZE - width + 1)
        for inside in (
            total[top + 9, left + width] - total[top, left + width] - total[top + 9, left] + total[top, left],
        )
    ]
    _, length, top, left = max(places)
    ink = _nearest(image, [COLOURS[colour or "red"], INK]) == 1
    text = ""
    for index in range(length):
        x = left + 2 + 4 * index
        dots = ink[top + 2 : top + 7, x : x + 3]
        wrong = {letter: int((dots != bitmap(rows)).sum()) for letter, rows in GLYPHS.items()}
        nearest = min(wrong, key=lambda letter: wrong[letter])
        text += nearest if wrong[nearest] <= WRONG_DOTS_ALLOWED else "?"
    return colour, text


def _score_sign(image: _Image, scene: Sign) -> dict[str, float]:
    colour, text = read_sign(image)
    right = sum(a == b for a, b in zip(text, scene.text, strict=False))
    return {
        "colour": float(colour == scene.colour),
        "characters": right / max(len(text), len(scene.text)),
        "words": float(text == scene.text),
    }


def score(image_HWC: npt.NDArray[np.uint8], caption: str) -> dict[str, float]:
    """Score a picture, uint8 [IMAGE_SIZE, IMAGE_SIZE, 3], on the DIMENSIONS that apply to its caption.

    Raises:
        ValueError: for a caption that is not of this world, or a picture of another size or type.
    """
    scene = require_scene(caption)
    if image_HWC.shape != (IMAGE_SIZE, IMAGE_SIZE, 3) or image_HWC.dtype != np.uint8:
        raise ValueError(
            f"score: found a picture {image_HWC.dtype} {image_HWC.shape}, expected uint8 "
            f"{(IMAGE_SIZE, IMAGE_SIZE, 3)}; sample at the teacher's own size"
        )
    if isinstance(scene, Landscape):
        return _score_landscape(image_HWC, scene)
    if isinstance(scene, Composition):
        return _score_composition(image_HWC, scene)
    return _score_sign(image_HWC, scene)

"""How the pocket world is drawn: the places that a caption leaves open, which of them noise prefers, the picture."""

import numpy as np
import numpy.typing as npt

from secondcast.pocket.lexicon import COLOURS, GLYPHS, GROUNDS, HORIZON, INK, PAPER, SHAPES, SKIES
from secondcast.pocket.world import CELL, IMAGE_SIZE, Landscape, Scene, Sign, bitmap

TOKEN: int = 4
"""Height and width of an image token, in pixels."""

BOARD_HEIGHT: int = 9

_Box = tuple[int, int]


def _stamp(image: npt.NDArray[np.uint8], rows: str, corner: _Box, colour: tuple[int, int, int]) -> None:
    mask = bitmap(rows)
    top, left = corner
    image[top : top + mask.shape[0], left : left + mask.shape[1]][mask] = colour


def _grid(low: int, high: int, *, pitch: int = CELL) -> range:
    """Multiples of the pitch from low to high, both included."""
    return range(-(-low // pitch) * pitch, high + 1, pitch)


_Arrangement = tuple[_Box, ...]


def _pairs(relation: str) -> list[_Arrangement]:
    """The first and the second object, on opposite sides of one row or column."""
    low, high = 0, IMAGE_SIZE - CELL
    along = relation in ("left", "right")
    both: list[_Arrangement]
    both = [((at, low), (at, high)) if along else ((low, at), (high, at)) for at in _grid(low, high)]
    return both if relation in ("left", "above") else [places[::-1] for places in both]


def _counted(count: int) -> list[_Arrangement]:
    """Equal objects, of which no two touch: one anywhere, two across, three in a triangle, four in the corners."""
    low, middle, high = 0, CELL, IMAGE_SIZE - CELL
    cells = _grid(low, high)
    if count == 1:
        return [((top, left),) for top in cells for left in cells]
    if count == 2:
        return [*_pairs("left"), *_pairs("above")]
    if count == 3:
        ends = ((low, high), (high, low))
        lying = [((one, low), (one, high), (two, middle)) for one, two in ends]
        return [*lying, *(((low, one), (high, one), (middle, two)) for one, two in ends)]
    return [((low, low), (low, high), (high, low), (high, high))]


def arrangements(scene: Scene) -> list[_Arrangement]:
    """All places that a caption leaves open: corners (top, left) of its objects, or of a sign's first letter."""
    free = IMAGE_SIZE - CELL
    if isinstance(scene, Sign):
        # The letters, not the board around them, begin with an image token.
        lefts = _grid(0, IMAGE_SIZE - _board_width(scene) - 2, pitch=TOKEN)
        tops = _grid(0, IMAGE_SIZE - BOARD_HEIGHT - 2)
        return [((TOKEN + top, TOKEN + left),) for top in tops for left in lefts]
    if isinstance(scene, Landscape):
        return [((free if scene.place == "ground" else 0, left),) for left in _grid(0, free)]
    if scene.relation is not None:
        return _pairs(scene.relation)
    return _counted(scene.count)


def arrangement_tokens(scene: Scene) -> npt.NDArray[np.bool_]:
    """The image tokens whose whims decide for each arrangement: bool [arrangements, tokens]."""
    places = arrangements(scene)
    side = IMAGE_SIZE // TOKEN
    tokens = np.zeros((len(places), side, side), dtype=np.bool_)
    for mask, corners in zip(tokens, places, strict=True):
        for top, left in corners:
            row, column = top // TOKEN, left // TOKEN
            mask[row : row + 2, column : column + 2] = True
    return tokens.reshape(len(places), -1)


def preferred(scene: Scene, whims: npt.NDArray[np.float64]) -> int:
    """Which arrangement standard normal whims, one per image token, choose: that with the largest sum."""
    return int((arrangement_tokens(scene) @ whims).argmax())


def _board_width(sign: Sign) -> int:
    return 4 * len(sign.text) + 3


def _draw_sign(sign: Sign, corner: _Box, image: npt.NDArray[np.uint8]) -> None:
    top, left = corner
    image[top - 2 : top - 2 + BOARD_HEIGHT, left - 2 : left - 2 + _board_width(sign)] = COLOURS[sign.colour]
    for index, letter in enumerate(sign.text):
        _stamp(image, GLYPHS[letter], (top, left + 4 * index), INK)


def draw(scene: Scene, arrangement: int) -> npt.NDArray[np.uint8]:
    """The picture of a scene in one of its arrangements, uint8 [IMAGE_SIZE, IMAGE_SIZE, 3]."""
    image = np.full((IMAGE_SIZE, IMAGE_SIZE, 3), PAPER, dtype=np.uint8)
    corners = arrangements(scene)[arrangement]
    if isinstance(scene, Sign):
        _draw_sign(scene, corners[0], image)
        return image
    if isinstance(scene, Landscape):
        image[:HORIZON], image[HORIZON:] = SKIES[scene.sky], GROUNDS[scene.ground]
        things = [scene.thing]
    elif scene.second is not None:
        things = [scene.first, scene.second]
    else:
        things = [scene.first] * scene.count
    for corner, thing in zip(corners, things, strict=True):
        _stamp(image, SHAPES[thing.shape], corner, COLOURS[thing.colour])
    return image


def render(scene: Scene, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """A picture of a scene, uint8 [IMAGE_SIZE, IMAGE_SIZE, 3]; `rng` settles what the caption leaves open."""
    return draw(scene, preferred(scene, rng.standard_normal((IMAGE_SIZE // TOKEN) ** 2)))

"""The pocket world: what can be seen in it, how it is told, how it is drawn.

Three kinds mirror the data sets of the paper: a `scene` is one object in a landscape, a `composition` is one kind
of object counted or two objects in a relation, a `sign` carries one to four letters. A fifth of the combinations is
held out by a hash of what a caption means, whatever its phrasing; placement is random and never told.
"""

import functools
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from secondcast.pocket.lexicon import (
    COLOURS,
    GLYPHS,
    GROUNDS,
    LONGEST_TEXT,
    NUMBERS,
    PHRASES,
    PLACES,
    PLURALS,
    PREFIXES,
    RELATIONS,
    SHAPES,
    SKIES,
    SUFFIXES,
    WORDS,
)

IMAGE_SIZE: int = 24
"""Height and width of an image, in pixels."""

CELL: int = 8
"""Objects stand at random cells of this many pixels, so that an image token (4 x 4) is always the same part of one."""

KINDS: tuple[str, ...] = ("scene", "composition", "sign")
SPLITS: tuple[str, ...] = ("train", "heldout")


@functools.cache
def bitmap(rows: str) -> npt.NDArray[np.bool_]:
    """The picture written as rows of 0 and 1: bool [height, width]."""
    mask = np.array([[cell == "1" for cell in row] for row in rows.split()])
    mask.flags.writeable = False
    return mask


def _check(field: str, value: object, allowed: Sequence[object]) -> None:
    if value not in allowed:
        raise ValueError(f"{field}: found {value!r}, expected one of {', '.join(map(str, allowed))}")


@dataclass(frozen=True, kw_only=True)
class Thing:
    """One object: a colour and a shape."""

    colour: str
    shape: str

    def __post_init__(self) -> None:
        _check("Thing.colour", self.colour, tuple(COLOURS))
        _check("Thing.shape", self.shape, tuple(SHAPES))

    @property
    def key(self) -> str:
        """Colour and shape in words."""
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True, kw_only=True)
class Landscape:
    """One object, in the sky or on the ground. Kind `scene`."""

    thing: Thing
    place: str
    sky: str
    ground: str

    def __post_init__(self) -> None:
        _check("Landscape.place", self.place, PLACES)
        _check("Landscape.sky", self.sky, tuple(SKIES))
        _check("Landscape.ground", self.ground, tuple(GROUNDS))

    @property
    def combination(self) -> str:
        """What decides the split."""
        return f"scene: {self.thing.key} {self.sky} {self.ground}"


@dataclass(frozen=True, kw_only=True)
class Composition:
    """`count` equal objects, or two different ones of which `first` is `relation` of `second`."""

    first: Thing
    count: int = 1
    relation: str | None = None
    second: Thing | None = None

    def __post_init__(self) -> None:
        _check("Composition.count", self.count, (1, 2, 3, 4))
        if (self.relation is None) != (self.second is None):
            raise ValueError("Composition: relation and second come together; give both or neither")
        if self.relation is not None:
            _check("Composition.relation", self.relation, tuple(RELATIONS))
            _check("Composition.count (of a pair)", self.count, (1,))
        if self.second == self.first:
            raise ValueError(f"Composition.second: found {self.first.key} twice, expected two different objects")

    @property
    def combination(self) -> str:
        """What decides the split."""
        if self.second is None:
            return f"count: {self.count} {self.first.key}"
        return "pair: " + " and ".join(sorted((self.first.key, self.second.key)))


@dataclass(frozen=True, kw_only=True)
class Sign:
    """A board of one colour with one to four letters. Kind `sign`."""

    text: str
    colour: str

    def __post_init__(self) -> None:
        _check("Sign.colour", self.colour, tuple(COLOURS))
        if not 1 <= len(self.text) <= LONGEST_TEXT or not set(self.text) <= set(GLYPHS):
            raise ValueError(f"Sign.text: found {self.text!r}, expected 1-{LONGEST_TEXT} letters of {''.join(GLYPHS)}")

    @property
    def combination(self) -> str:
        """What decides the split."""
        return f"sign: {self.text}"


Scene = Landscape | Composition | Sign


def split_of(scene: Scene) -> str:
    """`heldout` for a fifth of the combinations, by blake2b of what the caption means; else `train`."""
    digest = hashlib.blake2b(scene.combination.encode(), digest_size=8).digest()
    return "heldout" if int.from_bytes(digest, "big") % 5 == 0 else "train"


def _pick(rng: np.random.Generator, choices: Sequence[str]) -> str:
    return choices[int(rng.integers(len(choices)))]


def _draw_thing(rng: np.random.Generator) -> Thing:
    return Thing(colour=_pick(rng, tuple(COLOURS)), shape=_pick(rng, tuple(SHAPES)))


def _draw_composition(rng: np.random.Generator) -> Composition:
    first = _draw_thing(rng)
    if rng.random() < 0.5:
        return Composition(first=first, count=int(rng.integers(1, 5)))
    second = _draw_thing(rng)
    while second == first:
        second = _draw_thing(rng)
    return Composition(first=first, relation=_pick(rng, tuple(RELATIONS)), second=second)


def draw_scene(
    rng: np.random.Generator, *, split: str, kinds: Sequence[str] = KINDS, weights: Sequence[float] | None = None
) -> Scene:
    """One scene of a split (`train` or `heldout`), its kind uniform over `kinds` or by their weights."""
    _check("split", split, SPLITS)
    kind = str(rng.choice(kinds, p=weights))
    _check("kind", kind, KINDS)
    while True:
        scene: Scene
        if kind == "scene":
            places, skies, grounds = PLACES, tuple(SKIES), tuple(GROUNDS)
            sky, ground = _pick(rng, skies), _pick(rng, grounds)
            scene = Landscape(thing=_draw_thing(rng), place=_pick(rng, places), sky=sky, ground=ground)
        elif kind == "composition":
            scene = _draw_composition(rng)
        else:
            length = int(rng.choice(np.arange(1, LONGEST_TEXT + 1), p=(0.1, 0.2, 0.3, 0.4)))
            text = "".join(_pick(rng, tuple(GLYPHS)) for _ in range(length))
            scene = Sign(text=text, colour=_pick(rng, tuple(COLOURS)))
        if split_of(scene) == split:
            return scene


def _words_of(scene: Scene) -> tuple[str, dict[str, str]]:
    """The phrase family of a scene and the words of its slots, the relation still by its key."""
    if isinstance(scene, Sign):
        return "sign", {"text": scene.text, "colour": scene.colour}
    thing = scene.thing if isinstance(scene, Landscape) else scene.first
    slots = {"colour": thing.colour, "shape": thing.shape}
    if isinstance(scene, Landscape):
        return scene.place, slots | {"sky": scene.sky, "ground": scene.ground}
    if scene.second is not None and scene.relation is not None:
        second = {"colour_2": scene.second.colour, "shape_2": scene.second.shape}
        return "pair", slots | second | {"relation": scene.relation}
    if scene.count == 1:
        return "single", slots
    number = next(word for word, count in NUMBERS.items() if count == scene.count)
    return "count", {"colour": thing.colour, "shapes": PLURALS[thing.shape], "number": number}


def _fill(rng: np.random.Generator, template: str, slots: dict[str, str]) -> str:
    free = (name for name in re.findall(r"{(\w+)}", template) if name not in slots)
    return template.format(**slots, **{name: _pick(rng, WORDS[name]) for name in free})


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """One of the texts for a scene: a phrasing, and for two thirds also words that the picture ignores."""
    family, slots = _words_of(scene)
    if "relation" in slots:
        slots["relation"] = _pick(rng, RELATIONS[slots["relation"]])
    told = _fill(rng, _pick(rng, PHRASES[family]), slots)
    kind = rng.random()
    if kind < 0.5:
        return told + _fill(rng, _pick(rng, SUFFIXES[1:]), {})
    return _fill(rng, _pick(rng, PREFIXES[1:]), {}) + told if kind < 0.67 else told


def _pattern(template: str, named: bool) -> str:
    def slot(match: re.Match[str]) -> str:
        name = match.group(1)
        choices = f"[{''.join(GLYPHS)}]{{1,{LONGEST_TEXT}}}" if name == "text" else "|".join(WORDS[name])
        return f"(?P<{name}>{choices})" if named else f"(?:{choices})"

    return re.sub(r"{(\w+)}", slot, template)


def _grammar() -> list[tuple[str, re.Pattern[str]]]:
    before = "|".join(_pattern(prefix, False) for prefix in PREFIXES)
    after = "|".join(_pattern(suffix, False) for suffix in SUFFIXES)
    return [
        (family, re.compile(f"(?:{before}){_pattern(phrase, True)}(?:{after})"))
        for family, phrases in PHRASES.items()
        for phrase in phrases
    ]


_GRAMMAR = _grammar()


def _scene_of(family: str, found: dict[str, str]) -> Scene | None:
    if family == "sign":
        return Sign(text=found["text"], colour=found["colour"])
    if family == "count":
        shape = next(shape for shape, plural in PLURALS.items() if plural == found["shapes"])
        return Composition(first=Thing(colour=found["colour"], shape=shape), count=NUMBERS[found["number"]])
    first = Thing(colour=found["colour"], shape=found["shape"])
    if family in PLACES:
        return Landscape(thing=first, place=family, sky=found["sky"], ground=found["ground"])
    if family == "single":
        return Composition(first=first)
    second = Thing(colour=found["colour_2"], shape=found["shape_2"])
    if first == second:
        return None
    relation = next(name for name, phrases in RELATIONS.items() if found["relation"] in phrases)
    return Composition(first=first, relation=relation, second=second)


def parse(caption: str) -> Scene | None:
    """The scene that a caption tells, whatever its phrasing; None for a text that is not of this world."""
    for family, pattern in _GRAMMAR:
        match = pattern.fullmatch(caption)
        if match is not None:
            return _scene_of(family, match.groupdict())
    return None


def locate(caption: str) -> dict[str, tuple[int, int]]:
    """Spans of characters of the slots in a caption's phrase; empty for a text that is not of this world."""
    for _, pattern in _GRAMMAR:
        match = pattern.fullmatch(caption)
        if match is not None:
            return {name: match.span(name) for name in match.groupdict()}
    return {}


def require_scene(caption: str) -> Scene:
    """`parse`, or a ValueError for a text that is not of this world."""
    scene = parse(caption)
    if scene is None:
        raise ValueError(
            f"caption: found {caption!r}, expected a text of the pocket world (it is scored by its meaning); "
            "make some with secondcast.pocket.world.captions"
        )
    return scene


def is_heldout(caption: str) -> bool:
    """Whether a caption's combination is of the held-out fifth; ValueError if it is not of this world."""
    return split_of(require_scene(caption)) == "heldout"


def captions(count: int, *, seed: int, split: str, kinds: Sequence[str] = KINDS) -> list[str]:
    """`count` distinct captions, a pure function of the arguments; a longer list begins with the shorter one.

    Raises:
        ValueError: if 10,000 draws in a row bring no new caption.
    """
    rng = np.random.default_rng([seed, *hashlib.blake2b(split.encode(), digest_size=4).digest()])
    found: dict[str, None] = {}
    barren = 0
    while len(found) < count:
        text = caption(draw_scene(rng, split=split, kinds=kinds), rng)
        barren = barren + 1 if text in found else 0
        found[text] = None
        if barren == 10_000:
            raise ValueError(
                f"captions: found {len(found)} distinct ones, expected {count} (split {split!r}, "
                f"kinds {kinds!r}); ask for fewer or for more kinds"
            )
    return list(found)

"""The tables of the pocket world: colours, shapes, letters, and every phrase and word of its captions."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 40),
    "green": (30, 190, 60),
    "blue": (40, 70, 230),
    "yellow": (245, 225, 40),
    "purple": (150, 40, 190),
    "cyan": (40, 215, 225),
}
SKIES: dict[str, tuple[int, int, int]] = {
    "night": (25, 25, 50),
    "noon": (200, 225, 245),
    "dusk": (200, 120, 130),
}
GROUNDS: dict[str, tuple[int, int, int]] = {
    "sand": (205, 185, 140),
    "snow": (245, 245, 245),
    "stone": (110, 110, 115),
    "earth": (105, 70, 45),
}
PAPER: tuple[int, int, int] = (240, 240, 235)
INK: tuple[int, int, int] = (15, 15, 15)

SHAPES: dict[str, str] = {
    "square": "1111111 1111111 1111111 1111111 1111111 1111111 1111111",
    "circle": "0011100 0111110 1111111 1111111 1111111 0111110 0011100",
    "triangle": "0001000 0001000 0011100 0011100 0111110 0111110 1111111",
    "cross": "0011100 0011100 1111111 1111111 1111111 0011100 0011100",
    "ring": "0111110 1111111 1100011 1100011 1100011 1111111 0111110",
}
PLURALS: dict[str, str] = {shape: shape + ("es" if shape == "cross" else "s") for shape in SHAPES}
NUMBERS: dict[str, int] = {"two": 2, "three": 3, "four": 4}
RELATIONS: dict[str, tuple[str, ...]] = {
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
PLACES: tuple[str, ...] = ("sky", "ground")
GLYPHS: dict[str, str] = {
    "A": "010 101 111 101 101",
    "B": "110 101 110 101 110",
    "F": "111 100 110 100 100",
    "J": "001 001 001 101 111",
    "L": "100 100 100 100 111",
    "O": "111 101 101 101 111",
    "S": "111 100 111 001 111",
    "T": "111 010 010 010 010",
    "V": "101 101 101 101 010",
    "X": "101 101 010 101 101",
    "Y": "101 101 010 010 010",
    "Z": "111 001 010 100 111",
}
LONGEST_TEXT: int = 4
SHAPE_SIZE: int = 7
HORIZON: int = 12


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _words(
    "anna boris clara david elena felix grace hanna igor julia kevin laura martin nora oscar paula quentin "
    "rosa samuel tamara umberto valentina walter yvonne"
)
DAYS = _words("monday tuesday wednesday thursday friday saturday sunday")
MONTHS = _words("january february march april may june july august september october november december")
CITIES = _words("paris london berlin madrid lisbon vienna prague warsaw helsinki dublin athens budapest")
RELATIVES = _words("uncle aunt brother sister cousin nephew grandmother grandfather")
MOODS = _words("gladly slowly quietly proudly secretly calmly")

PHRASES: dict[str, tuple[str, ...]] = {
    "sky": (
        "a {colour} {shape} in the {sky} sky over {ground}",
        "a {shape} in {colour}, high in the {sky} sky, above {ground}",
    ),
    "ground": (
        "a {colour} {shape} on {ground} under a {sky} sky",
        "under a {sky} sky a {shape} in {colour} lies on {ground}",
    ),
    "single": ("a {colour} {shape}", "one {colour} {shape}", "a {shape} in {colour}"),
    "count": ("{number} {colour} {shapes}", "{shapes} in {colour}, {number} of them"),
    "pair": (
        "a {colour} {shape} {relation} a {colour_2} {shape_2}",
        "{relation} a {colour_2} {shape_2} is a {colour} {shape}",
        "a {shape} in {colour} {relation} a {shape_2} in {colour_2}",
    ),
    "sign": (
        'a {colour} sign that says "{text}"',
        'the letters "{text}" on a {colour} sign',
        'a {colour} board with the word "{text}"',
    ),
}
PREFIXES: tuple[str, ...] = ("", "{name} wrote: ", "dear {relative}, here is ", "in {month} {name} drew ")
SUFFIXES: tuple[str, ...] = (
    "",
    ", said {name} on {day}",
    ", drawn {mood} in {city}",
    ", for my {relative} {name}",
    ", a gift from {name} of {city}",
    ", seen {mood} by {name}",
    ", sent to {city} in {month}",
)
WORDS: dict[str, tuple[str, ...]] = {
    "colour": tuple(COLOURS),
    "colour_2": tuple(COLOURS),
    "shape": tuple(SHAPES),
    "shape_2": tuple(SHAPES),
    "shapes": tuple(PLURALS.values()),
    "number": tuple(NUMBERS),
    "sky": tuple(SKIES),
    "ground": tuple(GROUNDS),
    "relation": tuple(phrase for phrases in RELATIONS.values() for phrase in phrases),
    "name": NAMES,
    "day": DAYS,
    "month": MONTHS,
    "city": CITIES,
    "relative": RELATIVES,
    "mood": MOODS,
}

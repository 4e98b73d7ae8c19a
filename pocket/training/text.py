"""Text for the pocket's T5: sentences that nothing can be seen in, word pieces, and per-token tags of captions.

The sentences stand in for the web text behind a real T5: they give the encoder something to know that no picture
needs. Pieces are written down, not trained: short words are one piece, longer ones two, capitals always stand
alone, so that signs are spelled.
"""

import re
import string

import numpy as np
import numpy.typing as npt

from secondcast.pocket.lexicon import GLYPHS, PHRASES, PREFIXES, SUFFIXES, WORDS
from secondcast.pocket.world import Composition, Landscape, Sign, Thing, locate, require_scene

TOPICS: dict[str, dict[str, str]] = {
    "music": {
        "who": "composer singer drummer violinist",
        "what": "melody concert rhythm chorus album opera symphony lyric",
        "did": "rehearsed performed recorded conducted",
        "how": "harmonious loud solemn catchy",
    },
    "money": {
        "who": "banker trader accountant investor",
        "what": "price loan profit budget salary tax invoice dividend",
        "did": "lowered borrowed refunded audited",
        "how": "expensive bankrupt thrifty lucrative",
    },
    "law": {
        "who": "judge lawyer witness senator",
        "what": "verdict treaty contract appeal statute ballot petition amendment",
        "did": "signed disputed repealed enforced",
        "how": "unjust binding lenient constitutional",
    },
    "science": {
        "who": "chemist biologist physicist astronomer",
        "what": "theory proof experiment molecule equation hypothesis enzyme orbit",
        "did": "measured refuted predicted published",
        "how": "empirical plausible abstract rigorous",
    },
    "food": {
        "who": "cook baker waiter butcher",
        "what": "recipe supper flavour broth appetite banquet spice dessert",
        "did": "seasoned tasted ordered digested",
        "how": "salty stale nourishing bitter",
    },
    "travel": {
        "who": "pilot sailor tourist conductor",
        "what": "voyage delay ticket passport itinerary luggage ferry timetable",
        "did": "booked cancelled postponed missed",
        "how": "late exhausting distant punctual",
    },
    "letters": {
        "who": "poet novelist editor translator",
        "what": "novel stanza rumour chapter metaphor diary preface anecdote",
        "did": "wrote quoted revised memorised",
        "how": "witty tragic verbose anonymous",
    },
    "health": {
        "who": "doctor nurse surgeon patient",
        "what": "fever remedy diagnosis vaccine symptom recovery allergy prescription",
        "did": "cured examined prescribed endured",
        "how": "contagious healthy painful chronic",
    },
}
SENTENCES: tuple[str, ...] = (
    "the {who} {did} a {how} {what} in {city}",
    "{name} {mood} {did} the {what} before {day}",
    "my {relative} the {who} never {did} that {what} again",
    "was the {what} of {name} {how} or only {how}?",
    "since {month} every {who} in {city} has {did} one {what}",
    "{name} and {name} think the {what} is too {how}",
    "no {what}, said the {who}, is as {how} as a {what}",
    "after the {what} her {relative} {mood} {did} a {what}",
    "on {day} the {how} {who} from {city} {did} nothing",
    "if {name} had {did} it, the {what} would not be {how}",
)
SPECIAL: tuple[str, ...] = ("<pad>", "</s>", "<unk>", "<mask>")
MASK_ID: int = 3
LONGEST_WHOLE_WORD: int = 6

TAGS: dict[str, tuple[str, ...]] = {
    "colour": WORDS["colour"],
    "shape": WORDS["shape"],
    "where": ("alone", "left", "right", "above", "below", "sky", "ground"),
    "count": ("1", "2", "3", "4"),
    "sky": WORDS["sky"],
    "ground": WORDS["ground"],
    "letter": tuple(GLYPHS),
    "index": ("0", "1", "2", "3"),
    "length": ("1", "2", "3", "4"),
}
"""Per-token tags and their values, class 0 of each being `none`: what a token says of the picture."""
_OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}


def sentence(rng: np.random.Generator) -> str:
    """One sentence of the non-visual grammar; words share a topic, so that a masked one can be guessed."""
    topic = TOPICS[tuple(TOPICS)[int(rng.integers(len(TOPICS)))]]

    def word(match: re.Match[str]) -> str:
        choices = topic[match.group(1)].split() if match.group(1) in topic else WORDS[match.group(1)]
        return choices[int(rng.integers(len(choices)))]

    return re.sub(r"{(\w+)}", word, SENTENCES[int(rng.integers(len(SENTENCES)))])


def words() -> list[str]:
    """Every lower-case word of captions and sentences, sorted."""
    templates = [
        *SENTENCES,
        *PREFIXES,
        *SUFFIXES,
        *(phrase for phrases in PHRASES.values() for phrase in phrases),
    ]
    texts = [re.sub(r"{\w+}", " ", template) for template in templates]
    texts += [phrase for phrases in WORDS.values() for phrase in phrases]
    texts += [line for topic in TOPICS.values() for line in topic.values()]
    return sorted(set(re.findall(r"[a-z]+", " ".join(texts))))


def pieces() -> list[tuple[str, float]]:
    """The vocabulary in order of ids, each piece with its unigram log-probability."""
    scored: dict[str, float] = dict.fromkeys(SPECIAL, 0.0)
    for word in words():
        if len(word) <= LONGEST_WHOLE_WORD:
            scored.setdefault(f"▁{word}", -4.0)
        else:
            half = (len(word) + 1) // 2
            scored.setdefault(f"▁{word[:half]}", -5.0)
            scored.setdefault(word[half:], -5.0)
    for suffix in ("s", "es", "ed", "ing", "er", "ly", "tion", "ment", "th", "en", "an", "in", "or", "re"):
        scored.setdefault(suffix, -8.0)
    for sign in ("▁", *string.ascii_uppercase, *string.digits, *string.punctuation):
        scored.setdefault(sign, -3.0)
    for letter in (*string.ascii_lowercase, *"äöüßéèêëàâçñóíúåæøœ“”‘’–—…°€£"):
        scored.setdefault(letter, -12.0)
    return list(scored.items())


def _things(caption: str) -> list[tuple[Thing, str, tuple[str, ...]]]:
    """Each object of a caption: what it is, where it stands, and the slots that tell of it."""
    scene = require_scene(caption)
    slots = ("colour", "shape", "shapes", "number")
    if isinstance(scene, Landscape):
        return [(scene.thing, scene.place, slots)]
    if not isinstance(scene, Composition):
        return []
    if scene.second is None or scene.relation is None:
        return [(scene.first, "alone", slots)]
    first = (scene.first, scene.relation, slots)
    return [first, (scene.second, _OPPOSITE[scene.relation], ("colour_2", "shape_2"))]


def tagged_spans(caption: str) -> list[tuple[int, int, dict[str, str]]]:
    """Spans of characters that tell of the picture, each with its tags by name."""
    scene, spans = require_scene(caption), locate(caption)
    found: list[tuple[int, int, dict[str, str]]] = []
    for thing, where, slots in _things(caption):
        count = str(scene.count) if isinstance(scene, Composition) else "1"
        tags = {"colour": thing.colour, "shape": thing.shape, "where": where, "count": count}
        found += [(*spans[slot], tags) for slot in slots if slot in spans]
    found += [(*spans[slot], {slot: caption[slice(*spans[slot])]}) for slot in ("sky", "ground") if slot in spans]
    if isinstance(scene, Sign):
        found.append((*spans["colour"], {"colour": scene.colour, "length": str(len(scene.text))}))
        for index, letter in enumerate(scene.text):
            start = spans["text"][0] + index
            tags = {
                "letter": letter,
                "index": str(index),
                "length": str(len(scene.text)),
                "colour": scene.colour,
            }
            found.append((start, start + 1, tags))
    return found


def token_tags(caption: str, offsets: list[tuple[int, int]]) -> npt.NDArray[np.int64]:
    """Tags of each token, int64 [T, len(TAGS)], 0 for none; `offsets` are the tokens' spans of characters."""
    tags_TF = np.zeros((len(offsets), len(TAGS)), dtype=np.int64)
    for start, end, tags in tagged_spans(caption):
        inside = [t for t, (a, b) in enumerate(offsets) if a < end and b > start and b > a]
        for field, (name, values) in enumerate(TAGS.items()):
            if name in tags:
                tags_TF[inside, field] = values.index(tags[name]) + 1
    return tags_TF

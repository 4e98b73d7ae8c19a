"""Prompts for text rendering, modelled on the paper's CommonText: a subject that shows a sign with a text.

As in that set, nineteen in twenty signs have one word, in lower case and single quotes, and most are held by people
or animals. Subjects and phrases are this project's; words are the most frequent English ones by wordfreq (extra
`prompts`).
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from secondcast.storage_schemas.errors import MissingExtraError, PromptsError
from secondcast.storage_schemas.progress import counted

MOST_WORDS = 20_000
_BEARERS = (
    "accountant actor apprentice archer baker bear beekeeper bishop blacksmith bricklayer builder butcher "
    "captain carpenter cashier clown coach conductor cowboy crow deer detective diver donkey drummer duck "
    "electrician fairy firefighter fox gardener giant giraffe goat goose grandfather grandmother guard guitarist "
    "hamster hedgehog inventor jockey kangaroo king knight koala librarian llama mechanic mermaid miner monk "
    "mouse neighbor officer otter owl parrot penguin pianist pirate plumber postman prince queen raccoon referee "
    "robot sailor salesman shepherd soldier tailor toddler tortoise tourist turkey violinist waiter witch wizard "
    "wolf"
)
_THINGS = (
    "balloon bridge bus cake coat door fence gate house kite lorry mug notebook pillow shop train umbrella van "
    "wall window"
)
_SHOWN_BY_BEARERS = (
    "holding up a sign with the word{s} '{text}'",
    "with a cardboard sign that reads '{text}'",
    "pointing at a board with '{text}' on it",
    "unrolling a banner that says '{text}'",
    "wearing a cap with '{text}' on it",
    "raising a flag with the word{s} '{text}'",
)
_SHOWN_BY_THINGS = ("with the word{s} '{text}' painted on it", "with a label that reads '{text}'")
# Shares of signs by number of words (one: 96 %, two: 3.3 % in the paper's set), and of signs on objects (8 %).
_SHARES_OF_WORDS = {1: 0.95, 2: 0.04, 3: 0.01}
_SHARE_OF_THINGS = 0.08


@dataclass(kw_only=True)
class _Kind:
    """All signs of one kind by number, drawn without replacement by a lazy shuffle."""

    bearers: Sequence[str]
    phrases: Sequence[str]
    words: Sequence[str]
    length: int
    share: float
    drawn: int = 0
    moved: dict[int, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return len(self.bearers) * len(self.phrases) * len(self.words) ** self.length

    def draw(self, generator: random.Random) -> str:
        place = self.drawn + int(generator.random() * (self.total - self.drawn))
        number = self.moved.pop(place, place)
        if place != self.drawn:
            self.moved[place] = self.moved.pop(self.drawn, self.drawn)
        self.drawn += 1
        return self._text(number)

    def _text(self, number: int) -> str:
        number, bearer = divmod(number, len(self.bearers))
        number, phrase = divmod(number, len(self.phrases))
        chosen = []
        for _ in range(self.length):
            number, word = divmod(number, len(self.words))
            chosen.append(self.words[word])
        name = self.bearers[bearer]
        shown = self.phrases[phrase].format(text=" ".join(chosen), s="s" if self.length > 1 else "")
        return f"{'An' if name[0] in 'aeiou' else 'A'} {name} {shown}."


def text_prompts(count: int, *, seed: int, words: Sequence[str]) -> list[str]:
    """Make `count` distinct prompts, a function of seed and words; a larger count begins with the same ones.

    Raises PromptsError if there are fewer.
    """
    kinds = list(_kinds(words))
    if (most := sum(kind.total for kind in kinds)) < count:
        raise PromptsError(
            f"--num-prompts {count}: {counted(len(words), 'word')} can make at most {most} distinct prompts"
        )
    # Only random() is guaranteed to be reproducible across versions of Python; choice() and sample() are not.
    generator = random.Random(seed)
    return [_next_kind(kinds, generator).draw(generator) for _ in range(count)]


def frequent_words(count: int) -> list[str]:
    """English words of letters only, most frequent first; MissingExtraError without wordfreq."""
    try:
        from wordfreq import top_n_list
    except ImportError as error:
        raise MissingExtraError(
            "words for signs come from wordfreq, which is not installed: pip install 'secondcast[prompts]'"
        ) from error
    listed = top_n_list("en", 2 * MOST_WORDS, wordlist="small")
    return [word for word in listed if word.isascii() and word.isalpha()][:count]


def _kinds(words: Sequence[str]) -> Iterator[_Kind]:
    by_things = (
        (_BEARERS.split(), _SHOWN_BY_BEARERS, 1 - _SHARE_OF_THINGS),
        (_THINGS.split(), _SHOWN_BY_THINGS, _SHARE_OF_THINGS),
    )
    for length, share in _SHARES_OF_WORDS.items():
        for bearers, phrases, part in by_things:
            yield _Kind(bearers=bearers, phrases=phrases, words=words, length=length, share=share * part)


def _next_kind(kinds: Sequence[_Kind], generator: random.Random) -> _Kind:
    left = [kind for kind in kinds if kind.drawn < kind.total]
    point = generator.random() * sum(kind.share for kind in left)
    for kind in left:
        point -= kind.share
        if point < 0:
            return kind
    return left[-1]

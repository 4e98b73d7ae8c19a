"""Extracts the text that an image should show and scores the recognised text: pure functions of strings."""

import re
import unicodedata
from collections import Counter

# An apostrophe between letters closes nothing: "the dog's sign says 'i don't know'". A double quote after a digit, or
# after a digit and a space and before a space, opens nothing: inches, as in a 24" monitor and a 6 " by 9 " frame. After
# an opening quote it closes: a "ROUTE 66" sign.
_QUOTED = re.compile(
    r"(?<!\w)'((?:[^']|(?<=\w)'(?=\w))+)'(?!\w)"
    r"|(?<!\d)(?:(?<!\d\s)|(?=\"\S))\"([^\"]+)\""
    r"|“([^”]+)”"
    r"|(?<!\w)‘((?:[^’]|(?<=\w)’(?=\w))+)’(?!\w)"
)
# 'n' for "and" between two words, as in rock 'n' roll, unless the word before it announces a text: the letter 'n'.
_AND = re.compile(r"(?i:n|an)")
_ANNOUNCED = re.compile(
    r"(?i)\b(?:letters?|characters?|says?|saying|said|reads?|reading|spells?|spelling|writes?|writing|written|texts?|"
    r"words?|titled|named|called|label(?:l?ed)?|with|of|the|an?)\s$"
)


def quoted_text(prompt: str) -> str | None:
    """The quoted text of a prompt, several parts joined by a space; None if there is none."""
    parts = [next(part for part in match.groups() if part is not None) for match in _quotes(prompt)]
    return " ".join(parts).strip() or None


def without_quoted(prompt: str) -> str:
    """Replace each quoted text of a prompt by a comma."""
    kept, end = "", 0
    for match in _quotes(prompt):
        kept, end = f"{kept}{prompt[end : match.start()]},", match.end()
    return kept + prompt[end:]


def _quotes(prompt: str) -> list[re.Match[str]]:
    return [match for match in _QUOTED.finditer(prompt) if not _is_and(prompt, match)]


def _is_and(prompt: str, match: re.Match[str]) -> bool:
    """Whether a match is not a quote but 'n' for "and" between two words."""
    before, after = prompt[: match.start()], prompt[match.end() :]
    between = re.search(r"\w\s$", before) and re.match(r"\s\w", after)
    return bool(between and _AND.fullmatch(match[1] or match[4] or "") and not _ANNOUNCED.search(before))


# Typographic quotes, which fonts and recognisers choose as they like.
_STRAIGHT = str.maketrans(dict.fromkeys("‘’‚‛", "'") | dict.fromkeys("“”„‟", '"'))


def comparable(text: str) -> str:
    """Normalise a text for comparison: Unicode NFC, case and quotes folded, a space for each run of white space."""
    return " ".join(unicodedata.normalize("NFC", text).translate(_STRAIGHT).casefold().split())


def words_right(expected: str, read: str) -> float:
    """Fraction of the expected words that are read exactly, each word of the reading counted once; both normalised."""
    wanted, there = (Counter(comparable(text).split()) for text in (expected, read))
    return (wanted & there).total() / wanted.total() if wanted else 1.0


def window_right(expected: str, read: str) -> float:
    """Fraction of correct characters in the part of the reading that fits best, 0 to 1; both normalised.

    1 - smallest edit distance to any part of the reading / length of the expected text: text around it costs nothing.
    Source: Sellers 1980, The theory and computation of evolutionary distances.
    """
    one, other = comparable(expected), comparable(read)
    return 1 - min(_distances(one, other, anywhere=True)) / len(one) if one else 1.0


def characters_right(expected: str, read: str) -> float:
    """Fraction of correct characters: 1 - edit distance / length of the longer of the normalised texts, 0 to 1.

    1 - NED of the ICDAR 2019 robust reading challenges (arXiv 1909.07145), case ignored.
    """
    one, other = comparable(expected), comparable(read)
    longest = max(len(one), len(other))
    return 1 - edit_distance(one, other) / longest if longest else 1.0


def edit_distance(one: str, other: str) -> int:
    """Smallest number of insertions, deletions and substitutions of characters (Levenshtein 1966)."""
    return _distances(one, other, anywhere=False)[-1]


def _distances(one: str, other: str, *, anywhere: bool) -> list[int]:
    """Edit distance of a text to each beginning of another; anywhere: to the best part of it that ends there."""
    above = [0] * (len(other) + 1) if anywhere else list(range(len(other) + 1))
    for i, a in enumerate(one, start=1):
        row = [i]
        for j, b in enumerate(other, start=1):
            row.append(min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (a != b)))
        above = row
    return above

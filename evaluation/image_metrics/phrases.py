"""Extracts the objects named by a prompt, with word rules, or as T2I-CompBench does by spaCy's noun chunks.

Word rules: quoted text is dropped. The rest is split at punctuation, "and", prepositions, forms of "be" and of some
verbs of place, and before articles, possessives and numerals. Dropped are pieces after a verb that begin with none of
these ("was hung", "is walking"), pronouns and sides ("the left"), a single "-ing" word, and one followed by an article
("a man holding a sign").
"""

import re
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Self

from secondcast.evaluation.image_metrics.characters import without_quoted
from secondcast.storage_schemas.errors import MissingExtraError, SettingsError


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


# T2I-CompBench's limit, too.
MOST_PHRASES = 8
_BEGINNINGS = _set(
    "a an the this that these those my your his her its our their some several many no each every another one two "
    "three four five six seven eight nine ten"
)
_LINKS = _set(
    "and or of on in at by with without to from into onto over under above below beneath behind beside besides near "
    "between among across through around against inside outside along toward towards for as while next about beyond "
    "underneath atop upon off up down"
)
_VERBS = _set(
    "is are was were be being been has have had sits sat lies lay lays stands stood hangs hung stay stays rests "
    "rested holds held hidden wears wore shows showed says said"
)
_NO_THINGS = _set("top bottom left right side sides front back middle center centre side-by-side")
_PRONOUNS = _set("it they them he she him we us you i which who whose itself themselves there")
_WORDS = re.compile(r"[\w'’-]+|[^\w\s]")
# Chunks that T2I-CompBench leaves out, in this spelling only.
_NO_CHUNKS = ("top", "the side", "the left", "the right")


def noun_phrases(prompt: str) -> tuple[str, ...]:
    """The phrases of a prompt, in order, at most eight; empty if it names no object by these rules."""
    pieces: list[list[str]] = [[]]
    after_verb = [False]
    words = _WORDS.findall(without_quoted(prompt))
    for word in words:
        lower = word.lower()
        if lower in _BEGINNINGS and (pieces[-1] and pieces[-1][-1].lower() not in _BEGINNINGS):
            _drop_participle(pieces[-1])
            pieces.append([word])
            after_verb.append(False)
        elif lower in _LINKS or lower in _VERBS or not (word[0].isalnum() or word[0] == "_"):
            pieces.append([])
            after_verb.append(lower in _VERBS)
        else:
            pieces[-1].append(word)
    kept = (" ".join(p) for p, verb in zip(pieces, after_verb, strict=True) if _is_thing(p, after_verb=verb))
    return tuple(kept)[:MOST_PHRASES]


def _drop_participle(piece: list[str]) -> None:
    if len(piece) > 1 and piece[-1].lower().endswith("ing") and piece[-2].lower() not in _BEGINNINGS:
        piece.pop()


def _is_thing(piece: list[str], *, after_verb: bool) -> bool:
    begins = bool(piece) and piece[0].lower() in _BEGINNINGS
    rest = [word.lower() for word in piece[begins:]]
    is_participle = not begins and len(rest) == 1 and rest[0].endswith("ing")
    if not rest or is_participle or (after_verb and not begins):
        return False
    return not set(rest) <= _NO_THINGS | _PRONOUNS | _BEGINNINGS


@dataclass(frozen=True, kw_only=True)
class NounChunks:
    """A spaCy pipeline, used as in T2I-CompBench's scripts. name: versions of spaCy and of the pipeline."""

    name: str
    pipeline: Any

    @classmethod
    def load(cls, source: str) -> Self:
        """Load an installed pipeline by name, or from a folder.

        Raises MissingExtraError without spaCy, SettingsError for a pipeline that is missing or finds no noun chunks.
        """
        try:
            import spacy
        except ImportError as error:
            raise MissingExtraError(
                f"--phrases {source} needs spaCy, which is not installed: pip install 'secondcast[phrases]', then "
                f"python -m spacy download en_core_web_sm"
            ) from error
        try:
            pipeline = spacy.load(source)
            # Raises without a parser, and for a language without rules for noun chunks.
            list(pipeline("a red book").noun_chunks)
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise SettingsError(
                f"--phrases {source} is not a spaCy pipeline with noun chunks ({reason}): run python -m spacy download "
                f"en_core_web_sm and give --phrases en_core_web_sm, or give the folder of a pipeline"
            ) from error
        meta = pipeline.meta
        return cls(name=f"spaCy {version('spacy')}, {meta['lang']}_{meta['name']} {meta['version']}", pipeline=pipeline)

    def phrases(self, prompt: str) -> tuple[str, ...]:
        """The noun chunks of a prompt, in order, without four that name no object, at most eight."""
        chunks = (chunk.text for chunk in self.pipeline(prompt).noun_chunks)
        return tuple(chunk for chunk in chunks if chunk not in _NO_CHUNKS)[:MOST_PHRASES]

    def without_adjectives(self, prompt: str) -> str:
        """The tokens that are not adjectives, which T2I-CompBench compares with images of complex prompts by CLIP."""
        return " ".join(token.text for token in self.pipeline(prompt) if token.pos_ != "ADJ")

"""The things a prompt names, on prompts of T2I-CompBench's kinds."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secondcast.evaluation.image_metrics.phrases import MOST_PHRASES, noun_phrases

MIXED = ["a", "the", "is", "on", "left", "it", "two", "red", "cup", "holding", "and", ",", ".", "'x'", "dog's"]


@pytest.mark.parametrize(
    ("prompt", "phrases"),
    [
        ("a green bench and a red car", ("a green bench", "a red car")),
        ("rubber gloves and a fluffy teddy bear", ("rubber gloves", "a fluffy teddy bear")),
        ("The black chair is on the right of the wooden table.", ("The black chair", "the wooden table")),
        ("The rectangular mirror was hung above the marble sink.", ("The rectangular mirror", "the marble sink")),
        ("The bright orange pumpkin sat next to the crisp green apples.",
         ("The bright orange pumpkin", "the crisp green apples")),
        ("A politician holding a sign with the word 'circle'.", ("A politician", "a sign", "the word")),
        ("a balloon on the top of a giraffe", ("a balloon", "a giraffe")),
        ("A dog is walking with its owner.", ("A dog", "its owner")),
        ("four trucks", ("four trucks",)),
        ("'open'", ()),
        ("it is there", ()),
    ],
)  # fmt: skip
def test_the_phrases_of_a_prompt(prompt, phrases):
    assert noun_phrases(prompt) == phrases


@pytest.mark.slow
@settings(max_examples=50)
@given(st.lists(st.sampled_from(MIXED)).map(" ".join) | st.text(max_size=60))
def test_any_prompt_gives_at_most_eight_phrases_of_its_own_words(prompt):
    phrases = noun_phrases(prompt)
    assert len(phrases) <= MOST_PHRASES
    assert all(word in prompt for phrase in phrases for word in phrase.split())
    assert all(phrase.strip() for phrase in phrases)


def test_what_comes_after_the_eighth_is_not_asked():
    assert len(noun_phrases(" and ".join(f"a cup{i}" for i in range(12)))) == MOST_PHRASES

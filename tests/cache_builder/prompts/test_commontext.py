"""Text-rendering prompts: distinct, a function of the seed, as many as asked for or an error that says how many."""

import re

import pytest

from secondcast.cache_builder.prompts.commontext import frequent_words, text_prompts
from secondcast.storage_schemas.errors import PromptsError

FORM = re.compile(r"(A|An) ([a-z]+) [a-z ]+ '([a-z]+(?: [a-z]+){0,2})'[a-z ]*\.")


def test_prompts_are_distinct_and_of_one_form_mostly_with_one_word_of_the_list():
    words = frequent_words(5000)
    texts = text_prompts(4000, seed=0, words=words)
    found = [FORM.fullmatch(text) for text in texts]
    assert len(set(texts)) == 4000 and all(found)
    assert all((m[1] == "An") == (m[2][0] in "aeiou") for m in found)
    assert {word for m in found for word in m[3].split()} <= set(words)
    shares = [sum(len(m[3].split()) == n for m in found) / 4000 for n in (1, 2, 3)]
    assert shares == pytest.approx([0.95, 0.04, 0.01], abs=0.01)


def test_these_are_the_prompts_of_seed_0():
    # Pinned: caches are built of them, and a build goes on only with the same prompts.
    assert text_prompts(4, seed=0, words=["tea", "gold", "north"]) == [
        "A mouse with a cardboard sign that reads 'north'.",
        "An officer wearing a cap with 'tea' on it.",
        "A duck with a cardboard sign that reads 'gold'.",
        "A hedgehog raising a flag with the word 'tea'.",
    ]


def test_a_smaller_count_is_the_beginning_of_a_larger_one_and_another_seed_is_another_set():
    words = frequent_words(100)
    texts = text_prompts(300, seed=3, words=words)
    assert text_prompts(100, seed=3, words=words) == texts[:100]
    assert len(set(text_prompts(300, seed=4, words=words)) & set(texts)) < 30


def test_all_that_can_be_made_are_made_and_one_more_is_refused_with_their_number():
    with pytest.raises(
        PromptsError, match=r"^--num-prompts 10000: 2 words can make at most \d+ distinct prompts$"
    ) as error:
        text_prompts(10_000, seed=0, words=["tea", "gold"])
    most = int(re.search(r"at most (\d+)", str(error.value))[1])
    assert len(set(text_prompts(most, seed=0, words=["tea", "gold"]))) == most
    with pytest.raises(PromptsError, match=f"--num-prompts {most + 1}: .* can make at most {most}"):
        text_prompts(most + 1, seed=0, words=["tea", "gold"])


def test_words_are_letters_the_most_frequent_first():
    words = frequent_words(20_000)
    assert words[:5] == ["the", "to", "and", "of", "a"] and len(set(words)) == 20_000
    assert all(word.isascii() and word.isalpha() and word.islower() for word in words)

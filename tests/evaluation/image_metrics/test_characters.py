"""Which text should be read, and how much of it was: strings only."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secondcast.evaluation.image_metrics.characters import (
    characters_right,
    comparable,
    edit_distance,
    quoted_text,
    without_quoted,
)

WORDS = st.text(alphabet="abcXYZ é", max_size=12)


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("A sheep carrying a banner with words 'community'.", "community"),
        ("A zombie presenting a board that says 'i remember'.", "i remember"),
        ("The dog's sign says 'i don't know'.", "i don't know"),
        ('a mug with "No 7" and a cap with "Go"', "No 7 Go"),
        ("a poster with “Grand Opening”", "Grand Opening"),
        ("a poster with ‘it’s late’ on it", "it’s late"),
        ("the dogs' bowl and the cat's bed", None),
        ("a red car", None),
    ],
)
def test_the_text_to_be_read_is_what_a_prompt_quotes(prompt, text):
    assert quoted_text(prompt) == text
    assert text is None or text not in without_quoted(prompt)


@given(WORDS, WORDS)
def test_edit_distance_is_a_distance_between_the_bounds_of_the_lengths(one, other):
    distance = edit_distance(one, other)
    assert distance == edit_distance(other, one)
    assert (distance == 0) == (one == other)
    assert abs(len(one) - len(other)) <= distance <= max(len(one), len(other))


@given(WORDS, WORDS, WORDS)
def test_edit_distance_by_a_third_text_is_no_shorter(one, other, third):
    assert edit_distance(one, other) <= edit_distance(one, third) + edit_distance(third, other)


def test_edit_distances_of_known_pairs():
    assert [edit_distance(*pair) for pair in (("kitten", "sitting"), ("", "abc"), ("flaw", "lawn"))] == [3, 3, 2]


@given(WORDS, WORDS)
def test_characters_right_is_a_share_and_one_only_for_equal_texts(expected, read):
    share = characters_right(expected, read)
    assert 0 <= share <= 1
    assert (share == 1) == (comparable(expected) == comparable(read))


def test_case_and_white_space_do_not_count_and_further_text_does():
    assert characters_right("Grand  Opening", "GRAND\nOPENING ") == 1
    assert characters_right("open", "opan") == 0.75
    assert characters_right("open", "open now") == 0.5
    assert characters_right("open", "") == 0

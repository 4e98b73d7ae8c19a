"""Which text should be read, and how much of it was: strings only."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secondcast.evaluation.image_metrics.characters import (
    characters_right,
    comparable,
    edit_distance,
    quoted_text,
    window_right,
    without_quoted,
    words_right,
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
        ('a 12" pizza with the words "YUM" on it', "YUM"),
        ('a 24" monitor, a 27" monitor', None),
        ('a 6 " by 9 " frame that says "ART"', "ART"),
        ('a 24"x36" poster, "FOR SALE 2" on it', "FOR SALE 2"),
        ('a "ROUTE 66" sign beside a 12" pipe', "ROUTE 66"),
        ('a door with the number 5 "EXIT" on it', "EXIT"),
        ('a wall that says " OPEN "', "OPEN"),
        ("a 6' man, a 5' woman, and a sign 'TALL'", "TALL"),
        ('a man 6\'2" tall under a "MIND YOUR HEAD" sign', "MIND YOUR HEAD"),
        ("rock 'n' roll sign says 'LIVE'", "LIVE"),
        ("a Rock ‘N’ Roll poster says ‘LIVE’", "LIVE"),
        ("a cup that says 'N' on it", "N"),
        ("the '90s band's poster says 'LIVE'", "LIVE"),
    ],
)
def test_the_text_to_be_read_is_what_a_prompt_quotes(prompt, text):
    assert quoted_text(prompt) == text
    assert text is None or text not in without_quoted(prompt)


@given(
    text=st.text(alphabet="ABC 123é", min_size=1).filter(lambda text: text.strip()),
    inches=st.lists(st.sampled_from(['a 24" monitor', '12"x9" frames', "a 6 inch ruler", "rock 'n' roll"]), max_size=3),
    quotes=st.sampled_from(['""', "“”", "''", "‘’"]),
)
def test_inch_marks_and_shortened_words_around_a_quote_change_nothing(text, inches, quotes):
    prompt = ", ".join([*inches, f"a sign that says {quotes[0]}{text}{quotes[1]}, and {' and '.join(inches)}"])
    assert quoted_text(prompt) == text.strip()


def test_a_single_n_is_a_text_where_the_words_before_it_say_so():
    assert quoted_text("fish 'n' chips, the letter 'n' on it") == "n"
    assert without_quoted("fish 'n' chips, the letter 'n' on it") == "fish 'n' chips, the letter , on it"


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


def test_typographic_quotes_are_plain_ones():
    assert comparable("‘It’s’ “late”") == "'it's' \"late\""
    assert characters_right("it's late", "It’s late") == words_right("it's late", "It’s late") == 1


@given(WORDS, WORDS, WORDS, WORDS)
def test_text_around_the_expected_one_costs_nothing_in_the_best_window(before, expected, after, read):
    assert window_right(expected, f"{before} {expected} {after}") == 1
    assert 0 <= window_right(expected, read) <= 1
    # A whole reading is one of the windows.
    longest = max(len(comparable(expected)), len(comparable(read)))
    if longest == len(comparable(expected)):
        assert window_right(expected, read) >= characters_right(expected, read)


def test_the_best_window_counts_each_wrong_character_once():
    assert window_right("army", "ARMY EXIT") == 1 and characters_right("army", "ARMY EXIT") < 0.5
    assert window_right("open", "we are opan today") == 0.75
    assert window_right("open", "") == 0 == window_right("open", "xyz")


def test_words_are_read_exactly_and_counted_once():
    assert words_right("Grand  Opening", "the grand OPENING today") == 1
    assert words_right("mind the gap", "mind xhe gap") == pytest.approx(2 / 3)
    assert words_right("knock knock", "knock") == 0.5 == words_right("keep left", "left keeps")
    assert words_right("please knock", "pleaseknock") == 0

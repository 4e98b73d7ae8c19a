"""One text, one id."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from secondcast.storage_schemas.errors import NotInCacheError
from secondcast.storage_schemas.reader import Cache
from secondcast.storage_schemas.schema.prompts import Prompt, encode_prompts, identity_form, is_held_out, prompt_id
from tests.storage_schemas.caches import some_prompts, write_cache

# Every cache ever built depends on these: on the ids hang the held-out prompts, the noise and the guidance. Whoever
# edits one makes all recorded caches unreadable.
PINNED = {
    "a red car": "436297766fa4f20df4b8539ee29b6310",
    "café": "9883c13e4279980fe3f262ea93047f84",
    "1": "cea3878a334b240469d159ff840b6434",
    "fine": "904487a163bd8a70172346f3fc67c47d",
    "“OPEN”": "dee1bd51fcf061917d55991d79770108",
    "a b": "acc9227cc02e5f5c13e74125bce89499",
}
# White space of every kind, but what NFKC does not turn into a space and Unicode does not call white space.
SPACES = "\t\n\v\f\r \u0085\u00a0\u1680\u2000\u2005\u2009\u200a\u2028\u2029\u202f\u205f\u3000"
ZERO_WIDTH = (
    "\u00ad\u034f\u061c\u180b\u180e\u200b\u200c\u200d\u200e\u200f\u202a\u202e\u2060\u2064\u2066\u2069\ufe00\ufe0f\ufeff"
)


@pytest.mark.parametrize(("text", "identity"), PINNED.items())
def test_the_id_of_a_text_is_pinned(text, identity):
    assert prompt_id(text) == identity


@pytest.mark.parametrize(
    ("text", "other"),
    [
        ("café", "cafe\u0301"),
        ("café", " café\n"),
        ("a red car", "a  red\tcar"),
        ("a red car", "\u3000a\u00a0red\u2028car"),
        ("a red car", "\ufeffa red c\u200bar"),
        ("a red car", "a \u200b red car"),
        ("café", "cafe\u200d\u0301"),
        ("1", "\u2460"),
        ("fine", "\ufb01ne"),
        ("A", "\uff21"),
        ("\u2764", "\u2764\ufe0f"),
    ],
)
def test_spellings_that_look_alike_have_one_id(text, other):
    assert prompt_id(text) == prompt_id(other)


@pytest.mark.parametrize(
    ("text", "other"),
    [
        ("a red car", "A red car"),
        ("a red car", "a redcar"),
        ("a\x07b", "ab"),
        ("a\x1cb", "a b"),
        # The flags of England and Scotland differ in their tags alone.
        (
            "\U0001f3f4\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",
            "\U0001f3f4\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f",
        ),
    ],
)
def test_texts_that_say_something_else_have_ids_of_their_own(text, other):
    assert prompt_id(text) != prompt_id(other)


@given(st.text(st.sampled_from(SPACES + ZERO_WIDTH)))
def test_a_text_of_white_space_and_zero_width_characters_alone_has_no_identity(text):
    assert identity_form(text) == ""


@given(st.text(), st.sampled_from([*ZERO_WIDTH]), st.sampled_from([*SPACES]), st.data())
def test_the_identity_does_not_see_white_space_twice_nor_zero_width_characters(text, hidden, space, data):
    words = text.split(" ")
    place = data.draw(st.integers(0, len(text)))
    assert prompt_id(text[:place] + hidden + text[place:]) == prompt_id(text)
    assert prompt_id(space + (space + " ").join(words) + space) == prompt_id(text)
    assert identity_form(identity_form(text)) == identity_form(text)


def test_about_two_in_a_hundred_are_held_out_and_always_the_same():
    held = [is_held_out(prompt_id(f"text {i}")) for i in range(10_000)]
    assert 150 < sum(held) < 250
    assert held == [is_held_out(prompt_id(f"text {i}")) for i in range(10_000)]


@given(st.lists(st.text(min_size=1), min_size=1, max_size=5))
def test_offsets_lead_to_every_line_whatever_the_text(texts):
    prompts = [Prompt(id=prompt_id(t), text=t, sources=("s",), token_ids=(1,)) for t in texts]
    lines, offsets = encode_prompts(prompts)
    table = np.frombuffer(offsets, dtype="<u8")
    assert table[-1] == len(lines)
    assert [lines[a:b].count(b"\n") for a, b in itertools.pairwise(table)] == [1] * len(prompts)


def test_a_prompt_is_found_by_its_text(tmp_path):
    write_cache(tmp_path / "c")
    prompts = Cache.open(tmp_path / "c").prompts
    assert prompts.find("prompt number 4") == prompts.find(" prompt\u00a0number  4\u200b") == 4
    assert prompts[-1] == some_prompts(6)[-1] == list(prompts)[-1]
    with pytest.raises(NotInCacheError, match="no prompt 'prompt number 99'"):
        prompts.find("prompt number 99")

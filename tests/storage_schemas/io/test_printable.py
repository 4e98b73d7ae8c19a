"""What may go to a terminal: nothing that it obeys, nothing that its encoding does not have."""

import json
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secondcast.storage_schemas.io.printable import printable, printable_json

ENCODINGS = ["utf-8", "cp1252", "latin-1", "ascii", "cp437", "utf-16"]
ANY_TEXT = st.text(st.characters(codec=None, categories=None))
ANY_VALUE = st.recursive(
    ANY_TEXT | st.integers() | st.none(), lambda v: st.lists(v) | st.dictionaries(ANY_TEXT, v), max_leaves=4
)


@settings(max_examples=200, deadline=None)
@given(text=ANY_TEXT, encoding=st.sampled_from(ENCODINGS))
def test_any_text_is_one_line_that_its_encoding_has_and_no_terminal_obeys(text, encoding):
    shown = printable(text, encoding=encoding)
    shown.encode(encoding)
    assert not any(unicodedata.category(c) == "Cc" for c in shown)
    assert len(shown.splitlines()) <= 1
    assert not set(shown) & set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


@settings(max_examples=60, deadline=None)
@given(value=ANY_VALUE, encoding=st.sampled_from(ENCODINGS))
def test_json_reads_back_as_the_same_value_in_any_encoding(value, encoding):
    text = printable_json(value, encoding=encoding)
    assert json.loads(text.encode(encoding).decode(encoding)) == json.loads(json.dumps(value))
    assert not any(unicodedata.category(c) == "Cc" for c in text.replace("\n", ""))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, with ümlauts and 中文", "plain, with ümlauts and 中文"),
        ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
        ("\x9b2J", r"\x9b2J"),
        ("one\ntwo\ttabbed\rback", r"one\ntwo\ttabbed\rback"),
        ("\u202etxt.exe", r"\u202etxt.exe"),
        ("half \ud83d of a pair", r"half \ud83d of a pair"),
    ],
)
def test_only_what_a_terminal_obeys_is_written_out(text, shown):
    assert printable(text) == shown
    assert printable("中", encoding="cp1252") == r"\u4e2d"

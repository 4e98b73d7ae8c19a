"""JSON prompt files: a list, or lines of it, told apart by what they hold."""

import json

import pytest

from secondcast.cache_builder.prompts.json_rows import is_json, json_rows
from secondcast.storage_schemas.errors import PromptsError


def found(text, column=None):
    return [(row.text, row.sources) for row in json_rows(text, name="p", column=column)]


@pytest.mark.parametrize("items", [["a", "b"], [{"caption": "a", "id": 1}, {"id": 2, "Caption": "b"}], [{"x": "a"}, {"x": "b"}]])  # fmt: skip  # noqa: E501
@pytest.mark.parametrize("end", [None, "\n", "\r\n", "\r"])
def test_a_list_and_its_items_line_by_line_are_the_same(items, end):
    text = json.dumps(items, indent=1) if end is None else "".join(json.dumps(item) + end for item in items)
    assert found(text) == [("a", ()), ("b", ())]


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("colour", ("colour",)),
        (3, ("3",)),
        (1.5, ("1.5",)),
        (["a", 2, {"b": 1}, None, " "], ("a", "2")),
        ({"name": "x"}, ()),
        ([[1]], ()),
        (True, ()),
        (None, ()),
        ("", ()),
    ],
)
def test_a_source_is_a_text_a_number_or_a_list_of_these_and_anything_else_names_none(source, names):
    assert found(json.dumps({"text": "a", "Source": source})) == [("a", names)]


def test_an_empty_line_is_an_empty_row_and_null_an_empty_text():
    assert found('"a"\n\n{"text": null}\n') == [("a", ()), ("", ()), ("", ())]


@pytest.mark.parametrize(
    ("text", "known"),
    [
        ('{"text": "a"}\n{"text": "b"}', True),
        ('\n  {"text": "a"}\n', True),
        ('["a",\n"b"]', True),
        ('[{"text": "a"}]', True),
        ("{red|blue} car\n", False),
        ("[1girl], solo\n", False),
        ("[1, 2]", False),
        ("[]", False),
        ('"OPEN"\n"CLOSED"\n', False),
        ("a red car\n", False),
    ],
)
def test_json_is_known_by_what_it_holds(text, known):
    assert is_json(text) == known


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{\n"prompts": ["a"]\n}', r"^p is an object, expected a list of strings or of objects, or one per line$"),
        ("3", r"^p is a number, expected a list"),
        ("[1]", r"^p is a list of strings, but item 1 is a number: expected all strings, or all obj"),
        ('["a", {"text": "b"}]', r"^p is a list of strings, but item 2 is an object: "),
        ('[{"text": "b"}, []]', r"^p is a list of objects, but item 2 is a list: "),
        (
            '["a",\n "b" "c"]',
            r"^p line 2 column 6 is not JSON \(Expecting ',' delimiter\): expected a list of strings, or",
        ),
        ("[" * 100_000, r"^p line 1 is not JSON \(maximum recursion depth exceeded"),
        ('{"text": "a"}\r{"text": }\r', r"^p line 2 column 10 is not JSON \(Expecting value\)"),
        ('{"text": "a"}\n[]\n', r"^p line 2 is a list, expected an object or a string$"),
        ('{"text": "a"}\n{"txt": "b"}\n', r"^p line 2 has no column 'text': found txt$"),
        ('{"text": 3}\n', r"^p line 1, column 'text', is int, expected text$"),
        ("{}\n", r"^p line 1 has the columns none and none of prompt, text, caption: name one with :column=NAME$"),
        ('["a", "\\ud800"]', r"^p item 2 has a lone surrogate \(character 1\)"),
        ('{"text": "a", "source": "\\ud800"}', r"^p line 1, column 'source', has a lone surrogate"),
    ],
)
def test_other_json_is_refused_with_file_line_and_column(text, message):
    with pytest.raises(PromptsError, match=message):
        found(text)

"""Kinds of prompt files by their ending; what is no such file is refused in one line that names the place."""

import json

import pytest

from secondcast.cache_builder.prompts.files import read_prompts
from secondcast.storage_schemas.errors import BadPrompts


def found(folder, name, content, suffix=""):
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    read = read_prompts([f"{folder / name}{suffix}"], limit=None)
    return [(text.text, text.sources) for text in read.texts]


def test_a_line_separator_inside_a_prompt_does_not_cut_it(tmp_path):
    assert len(found(tmp_path, "p.txt", "one\u2028line\nanother\x0cline\n")) == 2


def test_any_other_ending_is_a_prompt_per_line(tmp_path):
    assert found(tmp_path, "p.prompts", "\ufeffa, b\n") == [("a, b", ("p",))]


@pytest.mark.parametrize("items", [["a", "b"], [{"caption": "a", "id": 1}, {"id": 2, "caption": "b"}], [{"x": "a"}, {"x": "b"}]])  # fmt: skip  # noqa: E501
def test_json_is_a_list_of_strings_or_of_objects(tmp_path, items):
    assert found(tmp_path, "p.json", json.dumps(items)) == [("a", ("p",)), ("b", ("p",))]


def test_a_line_of_jsonl_is_an_object_or_a_string_and_may_name_its_source(tmp_path):
    lines = (
        '{"text": "a", "source": "colour"}\n"b"\n\n{"text": "a", "source": "shape"}\n{"text": "c"}\n{"text": null}\n'
    )
    assert found(tmp_path, "p.jsonl", lines) == [("a", ("colour", "shape")), ("b", ("p",)), ("c", ("p",))]
    assert found(tmp_path, "p.jsonl", lines, ":name=all")[0] == ("a", ("all",))


def test_csv_and_tsv_give_one_column_quotes_and_line_ends_within_them_read(tmp_path):
    csv = 'id,caption\r\n1,"a red car, and ""a"" dog"\r\n2,\r\n\r\n3,"two\nlines"\r\n'
    assert [text for text, _ in found(tmp_path, "p.csv", csv)] == ['a red car, and "a" dog', "two\nlines"]
    assert [text for text, _ in found(tmp_path, "p.csv", csv, ":column=id")] == ["1", "2", "3"]
    assert found(tmp_path, "p.TSV", "prompt\tid\na, b\t1\n") == [("a, b", ("p",))]
    assert found(tmp_path, "one.csv", "words\na\n") == [("a", ("one",))]


@pytest.mark.parametrize("column", ["prompt", "text", "caption"])
def test_of_several_columns_the_usual_names_are_taken_in_their_order(tmp_path, column):
    names = ["id", "caption", "text", "prompt"][: 2 + ["caption", "text", "prompt"].index(column)]
    assert found(tmp_path, "p.csv", f"{','.join(names)}\n{','.join(f'a {n}' for n in names)}\n") == [
        (f"a {column}", ("p",))
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", b"", "p.txt is empty: expected one prompt per line"),
        ("p.txt", b"\n \n\n", "is empty"),
        ("p.txt", b"\x89PNG\r\n", r"is not UTF-8 text \(byte 0 is 0x89\)"),
        ("p.txt", b"a\0b", r"is a binary file \(it has a zero byte\)"),
        ("p.json", b"{}", "holds dict, expected a list of strings"),
        ("p.json", b"[1]", r"holds a list with other than strings \(item 1 is int\)"),
        ("p.json", b'["a", {"text": "b"}]', r"other than strings \(item 2 is dict\)"),
        ("p.json", b"[", "is not JSON"),
        ("p.json", b"[" * 100_000, "is not JSON"),
        ("p.json", b'["", " "]', r"holds no prompt \(2 lines, all empty\)"),
        ("p.json", b'["a", "\\ud800"]', "p.json item 2 has half of a surrogate pair"),
        ("p.json", b'[{"a": "x", "b": "y"}]', "p.json item 1 has the columns a, b and none of prompt, text, caption"),
        ("p.jsonl", b'{"text": "a"}\n{"text": \n', "p.jsonl line 2 is not JSON"),
        ("p.jsonl", b'{"text": "a"}\n[]\n', "p.jsonl line 2 is list, expected an object or a string"),
        ("p.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', "p.jsonl line 2 has no column 'text': found txt"),
        ("p.jsonl", b'{"text": 3}\n', "'text' of .*p.jsonl line 1 is int, expected text"),
        ("p.jsonl", b'{"text": "a", "source": 3}\n', "'source' of .*p.jsonl line 1 is int, expected text"),
        ("p.jsonl", b"{}\n", "p.jsonl line 1 has the columns  and none of prompt"),
        ("p.csv", b"a,b\n1,2\n", "p.csv line 1 has the columns a, b and none of prompt, text, caption: .*:column=NAME"),
        ("p.csv", b"a red car\na dog\n", "p.csv line 1 is 'a red car', expected a header such as prompt: add one"),
        ("p.csv", b"text,text\na,b\n", r"p.csv line 1 names a column twice \(text, text\)"),
        ("p.csv", b"text,id\na,1\na, b,2\n", r"p.csv line 3 has 3 columns, its header 2 \(text, id\): put a text"),
        ("p.csv", b'text\n"a\n', "p.csv line 2 is not CSV"),
        ("p.csv", b"text,id\n", r"holds no prompt \(0 lines"),
    ],
)
def test_other_files_are_refused_in_one_line(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadPrompts, match=message) as error:
        read_prompts([tmp_path / name], limit=None)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [("p.csv", b"a,b\n1,2\n"), ("p.json", b'[{"a": "x", "b": "y"}]'), ("p.jsonl", b'{"a":"","b":1}')],
)
def test_a_column_that_is_not_there_lists_those_that_are(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadPrompts, match=rf"{name} (line|item) 1 has no column 'c': found a, b"):
        read_prompts([f"{tmp_path / name}:column=c"], limit=None)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(BadPrompts, match=r"no prompt file .*nix.txt: expected a text file"):
        read_prompts([tmp_path / "nix.txt"], limit=None)
    with pytest.raises(
        BadPrompts, match=r"no prompt file a.txt:limti=5: .*'limti' is no key of a source, which are name,"
    ):
        read_prompts(["a.txt:limti=5"], limit=None)


def test_a_folder_is_refused_with_both_ways_out(tmp_path):
    with pytest.raises(BadPrompts, match=r"is a folder, .*`secondcast prompts compbench .* is given as hf:"):
        read_prompts([tmp_path], limit=None)

"""The one reader of prompt files: what a file is, and that prompts come back as they were written."""

import csv
import io
import json
import re
import tempfile
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from secondcast.cache_builder.prompts.files import read_prompts
from secondcast.cache_builder.prompts.rows import plain_rows
from secondcast.storage_schemas.errors import PromptsError
from secondcast.storage_schemas.schema.prompts import identity_form, prompt_id


def found(folder, name, content, suffix=""):
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    read = read_prompts([f"{folder / name}{suffix}"], limit=None)
    return [(text.text, text.sources) for text in read.texts]


def test_a_line_separator_inside_a_prompt_does_not_cut_it(tmp_path):
    assert len(found(tmp_path, "p.txt", "one\u2028line\nanother\x0cline\n")) == 2


def test_any_other_ending_is_a_prompt_per_line(tmp_path):
    assert found(tmp_path, "p.prompts", "\ufeffa, b\n") == [("a, b", ("p",))]


LINES = '{"Prompt": "a", "source": ["x", 3]}\n{"Prompt": "b", "source": {"url": "y"}}\n'


@pytest.mark.parametrize("name", ["p.jsonl", "p.JSONL", "p.ndjson", "p.json", "p.txt", "p.csv", "p"])
def test_json_lines_are_known_by_what_they_hold_whatever_the_ending(tmp_path, name):
    assert found(tmp_path, name, LINES) == [("a", ("x", "3")), ("b", ("p",))]
    assert found(tmp_path, name, json.dumps([json.loads(line) for line in LINES.splitlines()]))[1] == ("b", ("p",))


def test_strings_line_by_line_are_json_by_their_ending_alone(tmp_path):
    assert found(tmp_path, "p.ndjson", '"OPEN"\n') == [("OPEN", ("p",))]
    assert found(tmp_path, "p.txt", '"OPEN"\n') == [('"OPEN"', ("p",))]


def test_a_parquet_file_is_known_by_its_mark_where_it_has_no_ending(tmp_path):
    parquet.write_table(pa.table({"Caption": ["a"], "id": [1]}), tmp_path / "p.parquet")
    data = (tmp_path / "p.parquet").read_bytes()
    assert found(tmp_path, "q", data) == [("a", ("q",))]


@pytest.mark.parametrize("header", ["prompt", "Caption", "prompt;category", "id\ttext", '"id","prompt"', "a|PROMPT"])
def test_the_header_of_a_table_never_becomes_a_prompt(tmp_path, header):
    with pytest.raises(
        PromptsError, match=r"p.txt line 1 is .*, the header of a table: append :column=\w+ to read that"
    ):
        found(tmp_path, "p.txt", f"{header}\na{header[0]}b\n")
    assert len(found(tmp_path, "p.txt", f"\n{header}\nb\n")) == 2


def test_a_column_makes_a_table_of_any_file(tmp_path):
    assert found(tmp_path, "p.txt", "id;prompt\n1;a red car\n", ":column=prompt") == [("a red car", ("p",))]
    with pytest.raises(PromptsError, match=r"p.txt line 1 has no column 'text': found a red car$"):
        found(tmp_path, "p.txt", "a red car\n", ":column=text")


@pytest.mark.parametrize(
    ("name", "content"),
    [("p.csv", b"a,b\n1,2\n"), ("p.json", b'[{"a": "x", "b": "y"}]'), ("p.jsonl", b'{"a":"","b":1}')],
)
def test_a_column_that_is_not_there_lists_those_that_are(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PromptsError, match=rf"{name} (line|item) 1 has no column 'c': found a, b"):
        read_prompts([f"{tmp_path / name}:column=c"], limit=None)


@pytest.mark.parametrize("column", ["prompt", "text", "caption"])
def test_of_several_columns_the_usual_names_are_taken_in_their_order(tmp_path, column):
    names = ["id", "caption", "text", "prompt"][: 2 + ["caption", "text", "prompt"].index(column)]
    cells = [f"a {n}" for n in names]
    assert found(tmp_path, "p.csv", f"{','.join(names)}\n{','.join(cells)}\n") == [(f"a {column}", ("p",))]
    assert found(tmp_path, "p.json", json.dumps([dict(zip(names, cells, strict=True))])) == [(f"a {column}", ("p",))]


def test_control_characters_inside_a_prompt_are_kept(tmp_path):
    assert found(tmp_path, "p.txt", "a \x1b[31mred\x07 car\x1f\n") == [("a \x1b[31mred\x07 car\x1f", ("p",))]


@pytest.mark.parametrize("key", ["name=x", "limit=2", "repeat=2"])
def test_keys_of_builds_are_refused_where_no_build_is_made(tmp_path, key):
    (tmp_path / "p.txt").write_text("a\nb\na\n")
    with pytest.raises(PromptsError, match=rf"^{tmp_path}/p.txt:{key}: name=, limit= and repeat= only apply to builds"):
        plain_rows(f"{tmp_path}/p.txt:{key}")
    assert [row.text for row in plain_rows(str(tmp_path / "p.txt"))] == ["a", "b", "a"]


# What cannot be told from the marks of a file: a byte order mark at the beginning of a line.
TEXT = st.text(
    st.sampled_from("\"',;|\t {}[]:\r\n\u2028\x0c\x1b\ufeff\u200bab")
    | st.characters(exclude_categories=["Cs"], exclude_characters="\0"),
    min_size=1,
).filter(lambda text: identity_form(text) and not re.search(r"(^|[\r\n])\ufeff", text))
TEXTS = st.lists(TEXT, min_size=1, max_size=5, unique_by=prompt_id)
ENCODINGS = st.sampled_from(["utf-8", "utf-8-sig", "utf-16"])
LINE_ENDS = st.sampled_from(["\n", "\r\n", "\r"])
FUZZ = settings(deadline=None, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])


def read_back(name, text, encoding):
    """The prompts of a file with this text; None where it is refused with the line named."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / name
        file.write_bytes(text if encoding is None else text.encode(encoding))
        try:
            return [text.text for text in read_prompts([file], limit=None).texts]
        except PromptsError as error:
            assert re.match(rf"{re.escape(str(file))} line \d+", str(error)) and "\n" not in str(error), str(error)
            return None


@FUZZ
@given(TEXTS, ENCODINGS, LINE_ENDS, st.booleans())
def test_prompts_of_a_text_file_come_back(texts, encoding, end, closed):
    assume(not any(set(text) & {"\r", "\n"} for text in texts) and texts[0].lstrip()[:1] not in ("[", "{"))
    back = read_back("p.txt", end.join(texts) + end * closed, encoding)
    assert back == texts or (back is None and re.search("prompt|text|caption", texts[0].casefold()))


@pytest.mark.thorough
@FUZZ
@given(TEXTS, ENCODINGS, LINE_ENDS, st.sampled_from(["p.json", "p.jsonl", "p.ndjson", "p.JSON"]), st.booleans(), st.booleans())  # fmt: skip  # noqa: E501
def test_prompts_of_json_lines_and_lists_come_back(texts, encoding, end, name, ascii_only, named):
    items = [{"id": 1, "Prompt": text} for text in texts] if named else texts
    lines = [json.dumps(item, ensure_ascii=ascii_only) for item in items]
    assert read_back(name, end.join(lines), encoding) == texts
    assert read_back(name, json.dumps(items, ensure_ascii=ascii_only, indent=1), encoding) == texts


def table(texts, columns, **form):
    file = io.StringIO(newline="")
    writer = csv.writer(file, **form)
    writer.writerows([["prompt", "kind"][:columns], *([text, "a, b; c"][:columns] for text in texts)])
    return file.getvalue()


@pytest.mark.thorough
@FUZZ
@given(
    TEXTS, ENCODINGS, LINE_ENDS, st.sampled_from(",;\t|"), st.sampled_from(["p.csv", "p.tsv"]), st.sampled_from([1, 2]),
    st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_MINIMAL]),
)  # fmt: skip
def test_prompts_of_quoted_tables_come_back(texts, encoding, end, separator, name, columns, quoting):
    # This writer quotes a line end only if it is that of the rows.
    assume(quoting == csv.QUOTE_ALL or not any(set(text) & {"\r", "\n"} - set(end) for text in texts))
    # A header of one column does not show the separator: it is the one that the ending says.
    assume(columns == 2 or name == "p.csv" or separator == "\t")
    back = read_back(name, table(texts, columns, delimiter=separator, lineterminator=end, quoting=quoting), encoding)
    # In a table of one column a prompt may be the header again. A line end in a text that is quoted for this alone may
    # be one between rows, where quotes may be content.
    again = columns == 1 and any(text.strip().casefold() == "prompt" for text in texts)
    lines = quoting == csv.QUOTE_MINIMAL and separator in "\t|" and any(set(text) & {"\r", "\n"} for text in texts)
    assert back == texts or (back is None and (again or lines))


@pytest.mark.thorough
@FUZZ
@given(TEXTS, ENCODINGS, LINE_ENDS, st.sampled_from("\t|"), st.sampled_from(["p.csv", "p.tsv"]))
def test_prompts_of_tables_without_quoting_come_back(texts, encoding, end, separator, name):
    assume(not any(set(text) & {"\r", "\n", separator} for text in texts))
    # These are the bytes of a quoted table.
    assume(not any(text.startswith('"') and '""' in text for text in texts))
    rows = f"prompt{separator}kind{end}" + "".join(f"{text}{separator}x{end}" for text in texts)
    back = read_back(name, rows, encoding)
    assert back == texts or (back is None and any(text.startswith('"') for text in texts))


@FUZZ
@given(TEXTS)
def test_prompts_of_parquet_come_back(texts):
    file = io.BytesIO()
    parquet.write_table(pa.table({"PROMPT": texts, "id": list(range(len(texts)))}), file)
    assert read_back("p.parquet", file.getvalue(), None) == texts


# Counted by hand in the published files: lines of text (wc -l, awk), of JSON, elements of the JSON lists.
COMPBENCH_LINES = {
    "3d_spatial": 1000, "3d_spatial_train": 700, "3d_spatial_val": 300, "color": 1000, "color_train": 700,
    "color_val": 300, "color_val_seen": 200, "color_val_unseen": 100, "complex": 1000, "complex_train": 700,
    "complex_train_action": 504, "complex_train_spatial": 130, "complex_train_spatialaction": 66, "complex_val": 300,
    "complex_val_action": 212, "complex_val_spatial": 58, "complex_val_spatialaction": 30, "new_objects": 101,
    "non_spatial": 1000, "non_spatial_train": 700, "non_spatial_val": 300, "numeracy": 1000, "numeracy_train": 700,
    "numeracy_val": 300, "shape": 1000, "shape_train": 700, "shape_val": 300, "shape_val_seen": 200,
    "shape_val_unseen": 100, "spatial": 1000, "spatial_train": 700, "spatial_val": 300, "texture": 1000,
    "texture_train": 700, "texture_val": 300, "texture_val_seen": 200, "texture_val_unseen": 100,
}  # fmt: skip


def test_published_prompt_sets_are_read_whole(shared_prompts):
    files = {f"T2I-CompBench/{name}.txt": count for name, count in COMPBENCH_LINES.items()}
    files |= {"PartiPrompts.tsv": 1632, "geneval.jsonl": 553, "CommonText_Train.json": 50_000}
    files |= {"CommonText_Test.json": 1000}
    for name, count in files.items():
        rows = [row.text for row in plain_rows(str(shared_prompts / name)) if row.text.strip()]
        assert len(rows) == count, name
    parti = [row.text for row in plain_rows(str(shared_prompts / "PartiPrompts.tsv"))]
    assert parti[0] == "bond" and sum(text.count('"') for text in parti) == 46
    assert any(text.startswith('"G I G G L E" painted in thick colorful lettering') for text in parti)

"""Prompts from files: distinct, in order, with all their sources."""

import json

import pytest

from cache_builder.prompt_files import read_prompts
from storage_schemas.errors import BadPrompts


def test_lines_are_stripped_empty_ones_skipped_and_repeats_merged_with_their_sources(tmp_path):
    (tmp_path / "one.txt").write_bytes(b"a red car\r\n\n  a dog \na red car\n")
    (tmp_path / "two.json").write_text(json.dumps(["a dog", "a cafe\u0301", ""]))
    read = read_prompts([tmp_path / "one.txt", tmp_path / "two.json"], limit=None)
    assert [(t.text, t.sources) for t in read.texts] == [
        ("a red car", ("one",)),
        ("a dog", ("one", "two")),
        ("a café", ("two",)),
    ]
    assert (read.empty, read.repeated) == (2, 2)


def test_a_limit_keeps_the_first_distinct_prompts(tmp_path):
    (tmp_path / "p.txt").write_text("a\na\nb\nc\n")
    assert [t.text for t in read_prompts([tmp_path / "p.txt"], limit=2).texts] == ["a", "b"]


def test_a_line_separator_inside_a_prompt_does_not_cut_it(tmp_path):
    (tmp_path / "p.txt").write_text("one\u2028line\nanother\x0cline\n", encoding="utf-8")
    assert len(read_prompts([tmp_path / "p.txt"], limit=None).texts) == 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", b"", "p.txt is empty: expected one prompt per line"),
        ("p.txt", b"\n \n\n", "is empty"),
        ("p.txt", b"\x89PNG\r\n", r"is not UTF-8 text \(byte 0 is 0x89\)"),
        ("p.txt", b"a\0b", r"is a binary file \(it has a zero byte\)"),
        ("p.json", b"{}", "holds dict, expected a list of strings"),
        ("p.json", b"[1]", "holds a list with other than strings"),
        ("p.json", b"[", "is not JSON"),
        ("p.json", b'["", " "]', r"holds no prompt \(2 lines, all empty\)"),
    ],
)
def test_other_files_are_refused_in_one_line(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadPrompts, match=message) as error:
        read_prompts([tmp_path / name], limit=None)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(BadPrompts, match=r"no prompt file .*nix.txt: expected a text file"):
        read_prompts([tmp_path / "nix.txt"], limit=None)


def test_the_papers_prompt_sets_are_read(shared_prompts):
    compositions = read_prompts([shared_prompts / "T2I-CompBench/color_train.txt"], limit=None)
    assert (len(compositions.texts), compositions.repeated) == (679, 21)
    signs = read_prompts([shared_prompts / "CommonText_Train.json"], limit=None)
    assert (len(signs.texts), signs.repeated) == (50_000, 0)

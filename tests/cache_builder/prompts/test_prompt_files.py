"""Prompts of several sources: distinct, in order, with all their sources; every line is accounted for."""

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secondcast.cache_builder.prompts.files import SourcedText, read_prompts
from secondcast.storage_schemas.errors import PromptsError


def texts(*sources, limit=None):
    return [text.text for text in read_prompts(sources, limit=limit).texts]


def test_texts_stay_as_given_empty_lines_are_skipped_and_repeats_merged_with_their_sources(tmp_path):
    (tmp_path / "one.txt").write_bytes(b"a red car\r\n\n  a dog \n\xe2\x80\x8b\xe2\x81\xa0\na red car\n")
    (tmp_path / "two.json").write_text(json.dumps(["a dog", "a cafe\u0301", "", " \ufeff\u3000"]))
    read = read_prompts([tmp_path / "one.txt", tmp_path / "two.json"], limit=None)
    assert [(t.text, t.sources) for t in read.texts] == [
        ("a red car", ("one",)),
        ("  a dog ", ("one", "two")),
        ("a cafe\u0301", ("two",)),
    ]
    assert (read.empty, read.repeated) == (4, 2)
    assert read.skipped_text() == "4 empty and 2 repeated lines skipped"


@pytest.mark.parametrize("twin", ["a  red car", "a red\u00a0car ", "a r\u200bed car", "\uff41 red car"])
def test_a_prompt_that_is_spelled_in_other_white_space_or_hidden_characters_is_a_repeat(tmp_path, twin):
    (tmp_path / "p.txt").write_text(f"{twin}\na red car\nb\n")
    read = read_prompts([tmp_path / "p.txt"], limit=None)
    assert [text.text for text in read.texts] == [twin, "b"]
    assert [(count.lines, count.distinct, count.repeated) for count in read.counts] == [(3, 2, 1)]


def test_a_row_may_name_several_sources(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"text": "a", "source": ["x", 3, "x"]}\n{"text": "a", "source": {"y": 1}}\n')
    assert read_prompts([tmp_path / "p.jsonl"], limit=None).texts[0].sources == ("x", "3", "p")
    assert read_prompts([f"{tmp_path}/p.jsonl:name=all"], limit=None).texts[0].sources == ("all",)


def test_a_limit_keeps_the_first_distinct_prompts(tmp_path):
    (tmp_path / "p.txt").write_text("a\na\nb\nc\n")
    assert texts(tmp_path / "p.txt", limit=2) == ["a", "b"]


def test_under_a_limit_only_lines_of_kept_prompts_count_as_repeated(tmp_path):
    (tmp_path / "p.txt").write_text("a\nb\nc\nc\na\n\n")
    (tmp_path / "q.txt").write_text("b\nc\n")
    read = read_prompts([tmp_path / "p.txt", tmp_path / "q.txt"], limit=2)
    assert [t.sources for t in read.texts] == [("p",), ("p", "q")]
    assert read.skipped_text() == (
        "1 empty and 2 repeated lines skipped; 3 lines of other prompts skipped by --limit 2"
    )


def test_a_source_ends_with_the_last_prompt_of_its_own_limit(tmp_path):
    (tmp_path / "p.txt").write_text("a\na\nb\nc\n\na\n")
    (tmp_path / "q.txt").write_text("c\nb\nd\n")
    read = read_prompts([f"{tmp_path}/p.txt:limit=2", f"{tmp_path}/q.txt:limit=2"], limit=None)
    assert [(t.text, t.sources) for t in read.texts] == [("a", ("p",)), ("b", ("p", "q")), ("c", ("q",))]
    assert [(c.lines, c.distinct, c.new, c.repeated, c.ended) for c in read.counts] == [
        (3, 2, 2, 1, True),
        (2, 2, 1, 1, True),
    ]
    assert read.skipped_text() == (
        f"0 empty and 2 repeated lines skipped; stopped reading at {tmp_path}/p.txt:limit=2, {tmp_path}/q.txt:limit=2"
    )


def test_prompts_with_more_repeats_go_first_and_the_largest_of_a_prompts_repeats_counts(tmp_path):
    (tmp_path / "p.txt").write_text("a\nb\nc\n")
    (tmp_path / "q.txt").write_text("d\nb\n")
    (tmp_path / "r.txt").write_text("e\nb\n")
    sources = [tmp_path / "p.txt", f"{tmp_path}/q.txt:repeat=3", f"{tmp_path}/r.txt:repeat=2"]
    assert [(t.text, t.repeat) for t in read_prompts(sources, limit=None).texts] == [
        ("b", 3),
        ("d", 3),
        ("e", 2),
        ("a", 1),
        ("c", 1),
    ]


def test_a_name_takes_the_place_of_the_files(tmp_path):
    (tmp_path / "p.txt").write_text("a\n")
    read = read_prompts([f"{tmp_path}/p.txt:name=colours", tmp_path / "p.txt"], limit=None)
    assert read.texts == (SourcedText(text="a", sources=("colours", "p")),)


@given(
    files=st.lists(st.lists(st.sampled_from(["", "a", "b", "c", "d", " a"]), min_size=1, max_size=8), max_size=3),
    limit=st.none() | st.integers(1, 4),
    own=st.none() | st.integers(1, 4),
)
def test_every_line_is_new_empty_repeated_or_left_out(files, limit, own):
    with tempfile.TemporaryDirectory() as folder:
        sources = []
        for number, lines in enumerate([*files, ["e"]]):
            file = Path(folder) / f"{number}.txt"
            file.write_text("".join(f"{line}\n" for line in [*lines, "z"]))
            sources.append(f"{file}:limit={own}" if own else file)
        read = read_prompts(sources, limit=limit)
    for count in read.counts:
        assert count.lines == count.new + count.empty + count.repeated + count.left_out
        assert count.ended == (count.distinct == own)
    assert len(read.texts) == sum(count.new for count in read.counts) == len({text.text for text in read.texts})
    assert limit is None or len(read.texts) <= limit


def test_too_many_source_names_in_the_lines_are_refused_and_one_name_for_all_is_the_way_out(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text("".join(json.dumps({"text": f"a {i}", "source": f"s{i}"}) + "\n" for i in range(1001)))
    with pytest.raises(
        PromptsError,
        match=r"p.jsonl has 1001 different source names in its lines, but a cache records at most 1000: .*:name=",
    ):
        read_prompts([file], limit=None)
    assert read_prompts([f"{file}:name=mine"], limit=None).texts[1000].sources == ("mine",)


def test_the_papers_prompt_sets_are_read(shared_prompts):
    compositions = read_prompts([shared_prompts / "T2I-CompBench/color_train.txt"], limit=None)
    assert (len(compositions.texts), compositions.repeated) == (679, 21)
    signs = read_prompts([shared_prompts / "CommonText_Train.json"], limit=None)
    assert (len(signs.texts), signs.repeated) == (50_000, 0)

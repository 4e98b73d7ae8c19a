"""Encodings and line ends of prompt files, and where their bytes come from."""

import io
import os
import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secondcast.cache_builder.prompts.bytes import decoded, lines_of, read_source
from secondcast.storage_schemas.errors import PromptsError


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_unicode_is_read_by_its_byte_order_mark_else_as_utf_8(encoding):
    assert decoded("a café\n\U0001f600".encode(encoding), "p") == "a café\n\U0001f600"


def test_both_byte_orders_are_read():
    for order in ("le", "be"):
        for width in (16, 32):
            assert decoded("\ufeffa café".encode(f"utf-{width}-{order}"), "p") == "a café"


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_byte_order_marks_of_files_that_were_joined_are_dropped(end):
    assert lines_of(decoded(f"\ufeffa{end}\ufeffb{end}c\ufeffd{end}".encode(), "p")) == ["a", "b", "c\ufeffd"]


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\n")), min_size=1).filter(lambda lines: lines[-1]), st.sampled_from(["\n", "\r\n", "\r"]), st.booleans())  # fmt: skip  # noqa: E501
def test_lines_end_with_lf_crlf_or_cr_and_nothing_else(lines, end, closed):
    assert lines_of(end.join(lines) + end * closed) == lines


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"^p is empty: expected one prompt per line"),
        (b"\xef\xbb\xbf\n \n\n", r"^p is empty"),
        (
            b"a\r\rcaf\xe9\r",
            r"^p line 3 is not UTF-8 text \(byte 0xe9\): expected one prompt per line; save it as UTF-8",
        ),
        ("a\nb".encode("utf-16") + b"\n", r"^p line 2 is not UTF-16-LE text \(byte 0x0a\)"),
        ("a\ncafé".encode("utf-16-le"), r"^p line 1 has a zero byte: a binary file, or UTF-16 without its byte order"),
        (b"a\nb\0c", r"^p line 2 has a zero byte"),
        ("a\nb\0".encode("utf-16"), r"^p line 2 has a zero byte"),
        (b"\x89PNG\r\n\x1a\n\0\0", r"^p line 3 has a zero byte: a binary file"),
    ],
)
def test_other_bytes_are_refused_with_the_line(data, message):
    with pytest.raises(PromptsError, match=message):
        decoded(data, "p")


def test_a_pipe_is_read_once_and_whole(tmp_path):
    pipe = tmp_path / "pipe.txt"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(b"a\n" * 100_000,))
    writer.start()
    assert read_source(str(pipe)) == b"a\n" * 100_000
    writer.join()


def test_a_dash_is_stdin(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\nb\n")))
    assert read_source("-") == b"a\nb\n"
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(PromptsError, match=r"^- is stdin, but this process has none: give a file$"):
        read_source("-")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nix.txt", r"^no prompt file nix.txt: expected a text file \(a prompt per line\), .json, .*, or - for stdin$"),
        ("~nobody-of-that-name/x", r"^no prompt file ~nobody-of-that-name/x: expected"),
        ("a\0b", r"^no prompt file a\0b: expected"),
        ("a.txt:limti=5", r"'limti' is not a key of a source, which are name,"),
        (
            ".",
            r"^\. is a folder, expected a file: convert a T2I-CompBench folder with `secondcast prompts compbench \. "
            r"FILE.jsonl`, .* as hf:\.$",
        ),
        ("x" * 300, r"cannot be read \(File name too long\): make it readable$"),
    ],
)
def test_what_is_no_file_is_refused_in_one_line(path, message):
    with pytest.raises(PromptsError, match=message):
        read_source(path)

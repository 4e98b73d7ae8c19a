"""Reads a prompt file once, in any Unicode encoding and with any line ends."""

import codecs
import re
import sys
from pathlib import Path

from secondcast.cache_builder.prompts.sources import STDIN, unknown_key
from secondcast.storage_schemas.errors import PromptsError

# UTF-32 first: its little-endian byte order mark begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_LINE_END = re.compile(r"\r\n|\n|\r")
_MARK_AT_LINE = re.compile(r"(?:(?<=[\r\n])|\A)\ufeff+")


def read_source(path: str) -> bytes:
    """Read all bytes of a file, pipe or `-` (stdin) once; PromptsError if that fails."""
    if path == STDIN:
        if sys.stdin is None:
            raise PromptsError("- is stdin, but this process has none: give a file")
        return sys.stdin.buffer.read()
    file = Path(path)
    try:
        return file.read_bytes()
    except IsADirectoryError as error:
        raise PromptsError(
            f"{file} is a folder, expected a file: convert a T2I-CompBench folder with `secondcast prompts compbench "
            f"{file} FILE.jsonl`, or give the folder of a Hugging Face data set as hf:{file}"
        ) from error
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        raise PromptsError(
            f"no prompt file {file}: expected a text file (a prompt per line), .json, .jsonl, .csv, .tsv or .parquet, "
            f"hf:NAME, or - for stdin{unknown_key(path)}"
        ) from error
    except OSError as error:
        raise PromptsError(f"{file} cannot be read ({error.strerror}): make it readable") from error


def decoded(data: bytes, name: str) -> str:
    """Decode UTF-8, or UTF-16 or UTF-32 with a byte order mark; PromptsError names the first invalid line.

    A byte order mark is dropped at the beginning of every line: concatenated files have them inside.
    """
    mark, encoding = next(((m, e) for m, e in _MARKS if data.startswith(m)), (b"", "utf-8"))
    body = data[len(mark) :]
    # Before decoding: UTF-16 without its mark may fail as UTF-8 at any byte.
    if encoding == "utf-8" and (zero := body.find(b"\0")) >= 0:
        raise _zero_byte(name, body[:zero].decode(errors="replace"))
    try:
        text = body.decode(encoding)
    except UnicodeDecodeError as error:
        raise PromptsError(
            f"{name} line {_line_after(body[: error.start].decode(encoding))} is not {encoding.upper()} text (byte "
            f"0x{body[error.start]:02x}): expected one prompt per line; save it as UTF-8"
        ) from error
    if (zero := text.find("\0")) >= 0:
        raise _zero_byte(name, text[:zero])
    text = _MARK_AT_LINE.sub("", text)
    if not text.strip(" \t\r\n"):
        raise PromptsError(f"{name} is empty: expected one prompt per line, or a JSON list of strings")
    return text


def _zero_byte(name: str, before: str) -> PromptsError:
    return PromptsError(
        f"{name} line {_line_after(before)} has a zero byte: a binary file, or UTF-16 without its byte order mark; "
        f"expected one prompt per line; save it as UTF-8"
    )


def _line_after(before: str) -> int:
    return 1 + len(_LINE_END.findall(before))


def lines_of(text: str) -> list[str]:
    """Split a text at LF, CRLF or CR, without an empty last line."""
    # Not splitlines: a prompt may have a form feed or a Unicode line separator.
    lines = _LINE_END.split(text)
    return lines[:-1] if len(lines) > 1 and not lines[-1] else lines

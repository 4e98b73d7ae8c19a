"""Prompt sources as users write them: PATH, - for stdin, or hf:NAME, followed by `:key=value` suffixes."""

import re
from pathlib import Path
from typing import Any, Self

from pydantic import Field, ValidationError, model_validator

from secondcast.storage_schemas.errors import PromptsError
from secondcast.storage_schemas.schema.json_files import Record
from secondcast.storage_schemas.schema.problems import first_problem

HUB = "hf:"
STDIN = "-"
# stdin, and the pipes of a shell's process substitution, whose numbers change from run to run.
_OF_THE_PROCESS = re.compile(r"/dev/stdin|/dev/fd/\d+|/proc/(self|\d+)/fd/\d+")
KEYS = ("name", "limit", "repeat", "column", "split", "config", "revision")
# A repeat is a sample: the paper has ten, and samples are represented as the bits of an integer.
MOST_REPEATS = 10_000
_SUFFIX = re.compile(rf"(.+):({'|'.join(KEYS)})=([^:]*)", re.DOTALL)
_MOST_DIGITS = 15


class PromptSource(Record):
    """A prompt source; also parsed from a string such as "a.csv:column=caption:limit=100", or from a plain Path.

    Raises PromptsError for an invalid string.
    path: a file or pipe, - for stdin, or hf: followed by a folder or hub name.
    name: None for the stem of the file, "stdin" for a pipe of this process, or the last part of a data set's name.
    limit: number of distinct prompts after which reading stops.
    repeat: factor on the samples per prompt.
    column: column of a table with the prompts; a file with any extension is then read as a table.
    split, config, revision: for Hugging Face data sets only.
    """

    path: str = Field(min_length=1)
    name: str | None = Field(default=None, min_length=1)
    limit: int | None = Field(default=None, ge=1)
    repeat: int = Field(default=1, ge=1, le=MOST_REPEATS)
    column: str | None = Field(default=None, min_length=1)
    split: str | None = Field(default=None, min_length=1)
    config: str | None = Field(default=None, min_length=1)
    revision: str | None = Field(default=None, min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _of_a_string_or_path(cls, value: Any) -> Any:
        if isinstance(value, Path):
            return {"path": str(value)}
        return _fields(value) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _keys_go_with_the_kind(self) -> Self:
        for key in ("split", "config", "revision"):
            if getattr(self, key) is not None and not self.is_dataset:
                raise PromptsError(f"{self.path} has {key}={getattr(self, key)}, which only hf:NAME accepts: omit it")
        return self

    @classmethod
    def of(cls, given: "PromptSource | Path | str") -> "PromptSource":
        """Parse a source as given; PromptsError if it is invalid."""
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            raise PromptsError(f"prompt source {str(given)!r}: {first_problem(error)}") from error

    @property
    def is_dataset(self) -> bool:
        """Whether the source is read by Hugging Face `datasets`."""
        return self.path.startswith(HUB)

    @property
    def ending(self) -> str:
        """File extension, in lower case."""
        return Path(self.path).suffix.lower()

    @property
    def shown(self) -> str:
        """The source as shown in messages."""
        return "stdin" if self.path == STDIN else self.path

    @property
    def source_name(self) -> str:
        """The source name recorded with its prompts."""
        if self.name is not None:
            return self.name
        if self.is_dataset:
            return Path(self.path.removeprefix(HUB)).absolute().name
        if self.path == STDIN or _OF_THE_PROCESS.fullmatch(self.path):
            return "stdin"
        return Path(self.path).stem


def unknown_key(path: str) -> str:
    """Hint for the message about a missing path, whose last `:key=value` may be misspelt."""
    found = re.search(r":([A-Za-z_-]+)=[^:]*$", path)
    return f"; {found[1]!r} is not a key of a source, which are {', '.join(KEYS)}" if found else ""


def _fields(text: str) -> dict[str, Any]:
    given: dict[str, Any] = {}
    rest = text
    while found := _SUFFIX.fullmatch(rest):
        rest, key, value = found.groups()
        if key in given:
            raise PromptsError(f"prompt source {text!r} has {key}= twice: omit one")
        given[key] = _number(text, key, value) if key in ("limit", "repeat") else value
        if not value:
            raise PromptsError(f"prompt source {text!r} has an empty {key}=: give a value, or omit it")
    return {"path": rest, **given}


def _number(text: str, key: str, value: str) -> int:
    most = MOST_REPEATS if key == "repeat" else 10**_MOST_DIGITS
    if value.isascii() and value.isdigit() and len(value) <= _MOST_DIGITS and 1 <= int(value) <= most:
        return int(value)
    raise PromptsError(f"prompt source {text!r} has {key}={value}, expected an integer from 1 to {most}")

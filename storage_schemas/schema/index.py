"""commits/index.json of a finished build: one JSON document with one record per line.

A cache of a million trajectories has some 30,000 records. Opening checks a digest over the bytes and parses the first
line; a record is parsed on first access.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import groupby
from typing import Any

import numpy as np

from secondcast.storage_schemas.errors import DamagedCacheError, NotACacheError
from secondcast.storage_schemas.io.digests import canonical_json, digest

_FORMAT = "secondcast-index"
_AFTER_RECORDS = b"\n],"
_PATH = re.compile(rb'"path":"((?:[^"\\]|\\.)*)"')

Key = tuple[str, int]
Entry = dict[str, Any]


def index_bytes(entries: Sequence[Entry], counts: dict[str, int]) -> bytes:
    """The bytes of an index of records (JSON values by kind and shard); equal provenances are written once."""
    provenances: dict[str, tuple[int, Any]] = {}
    lines = []
    for entry in entries:
        number, _ = provenances.setdefault(digest(entry["provenance"]), (len(provenances), entry["provenance"]))
        lines.append(canonical_json({**entry, "provenance": number}))
    shards: dict[str, list[list[int]]] = {}
    for kind, group in groupby(entries, key=lambda entry: entry["kind"]):
        shards[kind] = _ranges([entry["shard"] for entry in group])
    header = {
        "format": _FORMAT,
        **counts,
        "shards": shards,
        "provenances": [value for _, value in provenances.values()],
    }
    opening = json.dumps(header, ensure_ascii=False, separators=(",", ":"))[:-1].encode() + b',"records":['
    body = opening + b"".join(b"\n" + line + b"," for line in lines)[:-1]
    return body + _AFTER_RECORDS + f'"digest":"{_digest(body)}"}}\n'.encode()


def _ranges(numbers: list[int]) -> list[list[int]]:
    found: list[list[int]] = []
    for number in numbers:
        if found and found[-1][1] == number:
            found[-1][1] += 1
        else:
            found.append([number, number + 1])
    return found


def _digest(body: bytes | memoryview) -> str:
    return hashlib.blake2b(body, digest_size=16).hexdigest()


class Index:
    """A parsed index: `header` has the counts, `lines` the line of each record by kind and shard."""

    def __init__(self, data: bytes, where: str) -> None:
        """Raise DamagedCacheError for bytes that differ from what was written, NotACacheError for another file."""
        self._data, self._where = data, where
        self._first, self._end = data.find(b"\n"), data.rfind(_AFTER_RECORDS)
        stated = found = None
        try:
            stated = json.loads(b"{" + data[self._end + len(_AFTER_RECORDS) :])["digest"]
            found = _digest(memoryview(data)[: self._end])
            self.header: dict[str, Any] = json.loads(data[: self._first] + b"]}")
        except (ValueError, KeyError, TypeError):
            self.header = {}
        if found is None or stated != found or not self.header:
            raise DamagedCacheError(
                f"{where} differs from what was written ({len(data)} bytes, digest {found}, stated {stated}): the file "
                f"was changed or damaged; delete it and rerun the build command to rewrite it"
            )
        if self.header.get("format") != _FORMAT:
            raise NotACacheError(f"{where} has format {self.header.get('format')!r}, expected {_FORMAT!r}")
        try:
            self.lines: dict[Key, int] = {key: line for line, key in enumerate(self._keys())}
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise self._not_valid(error) from error

    def _not_valid(self, error: Exception) -> DamagedCacheError:
        return DamagedCacheError(
            f"{self._where} is not a valid index ({error}): delete it and rerun the build command to rewrite it"
        )

    def _keys(self) -> Iterator[Key]:
        for kind, ranges in self.header["shards"].items():
            for begin, end in ranges:
                for shard in range(begin, end):
                    yield kind, shard

    @cached_property
    def _starts(self) -> Any:
        """Offsets of the lines of the records, and of the line after them."""
        text = np.frombuffer(self._data, dtype=np.uint8, count=self._end + 1)[self._first :]
        return np.flatnonzero(text == ord("\n")) + self._first + 1

    def entry(self, line: int) -> Entry:
        """The JSON value of a record."""
        try:
            text = self._data[self._starts[line] : self._starts[line + 1] - 1]
            entry: Entry = json.loads(text.removesuffix(b","))
            return {**entry, "provenance": self.header["provenances"][entry["provenance"]]}
        except (LookupError, TypeError, ValueError, RecursionError) as error:
            raise self._not_valid(error) from error

    def line_of(self, path: str) -> int | None:
        """The line of the record that names a file."""
        return self._lines_by_path.get(path)

    @cached_property
    def _lines_by_path(self) -> dict[str, int]:
        found = [(match.start(), match[1]) for match in _PATH.finditer(self._data, self._first)]
        lines = np.searchsorted(self._starts, [start for start, _ in found], side="right") - 1
        paths = (json.loads(b'"%b"' % text) if b"\\" in text else text.decode() for _, text in found)
        return dict(zip(paths, lines.tolist(), strict=True))

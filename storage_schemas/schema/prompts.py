"""Prompts as JSON lines, identified by their text, with an offset table so that opening a cache reads none of them."""

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np
import numpy.typing as npt

from secondcast.storage_schemas.errors import DamagedCacheError, NotInCacheError
from secondcast.storage_schemas.io.digests import digest, xxh3_128, xxh3_128_of_parts
from secondcast.storage_schemas.io.folders import Folder

PROMPTS_FILE = "prompts.jsonl"
OFFSETS_FILE = "prompts.offsets"
_PIECE_BYTES = 64 * 2**20
# One prompt in fifty (2 %), by id, so that a text is held out in every cache.
HELD_OUT_EVERY = 50


# Zero-width characters that control how their neighbours are joined, broken, ordered or drawn: soft hyphen, grapheme
# joiner, Arabic letter mark, Mongolian selectors and vowel separator, zero-width space, joiners and word joiner,
# directional marks and embeddings, invisible operators, variation selectors, byte order mark. The tags that spell
# flags (U+E0020 ..) are excluded: only they distinguish the flags.
_ZERO_WIDTH = re.compile("[\u00ad\u034f\u061c\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufe00-\ufe0f\ufeff]")
# Unicode's White_Space property, without what NFKC turns into a space. str.split() also splits at U+001C .. U+001F.
_WHITE_SPACE = re.compile("[\t-\r \u0085\u1680\u2028\u2029]+")


def identity_form(text: str) -> str:
    """The form that identifies a prompt: without zero-width characters, in NFKC, runs of white space as one space.

    Empty for a text of nothing else. It is only compared and hashed: a cache records the text as given.
    """
    # Zero-width characters are removed first: one between a letter and its accent keeps NFKC from composing them.
    return _WHITE_SPACE.sub(" ", unicodedata.normalize("NFKC", _ZERO_WIDTH.sub("", text))).strip(" ")


def prompt_id(text: str) -> str:
    """blake2b (128 bit, hex) of the identity form of a text: the same for every teacher."""
    return hashlib.blake2b(identity_form(text).encode(), digest_size=16).hexdigest()


def is_held_out(identity: str) -> bool:
    """Whether this prompt is never used in training: a function of its id alone."""
    return int(identity[-8:], 16) % HELD_OUT_EVERY == 0


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt text as given, with its id, the names of all its sources, and its token ids.

    token_ids: from the teacher's tokenizer, truncated to the text length, end token included, unpadded.
    """

    id: str
    text: str
    sources: tuple[str, ...]
    token_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.id != prompt_id(self.text):
            raise ValueError(f"prompt id is {self.id}, its text {self.text!r} has {prompt_id(self.text)}")
        if not all(isinstance(token, int) for token in self.token_ids):
            raise ValueError(f"prompt {self.id} has token ids that are not integers: {self.token_ids!r}")
        if not self.sources or not self.token_ids:
            raise ValueError(f"prompt {self.id} has {len(self.sources)} sources and {len(self.token_ids)} tokens")

    @property
    def held_out(self) -> bool:
        """Whether this prompt is never used in training."""
        return is_held_out(self.id)


def ids_digest(ids: Iterable[str]) -> str:
    """Digest of the ids of prompts in order."""
    return digest(list(ids))


def encode_prompts(prompts: Sequence[Prompt]) -> tuple[bytes, bytes]:
    """The bytes of prompts.jsonl and of its offset table (count + 1 little-endian uint64)."""
    # Not asdict(): its deep copy takes longer than everything else here.
    names = [field.name for field in fields(Prompt)]
    records = ({name: getattr(prompt, name) for name in names} for prompt in prompts)
    lines = [(json.dumps(record, ensure_ascii=False) + "\n").encode() for record in records]
    return b"".join(lines), offset_table(lines)


def offset_table(lines: Sequence[bytes]) -> bytes:
    """The bytes of prompts.offsets, from the lines of prompts.jsonl with their line ends."""
    offsets = np.zeros(len(lines) + 1, dtype="<u8")
    np.cumsum([len(line) for line in lines], out=offsets[1:])
    return offsets.tobytes()


class PromptTable(Sequence[Prompt]):
    """The prompts of a cache, in prompt order, read one line at a time.

    Both files are compared with their checksums (xxh3_128) on first access, unless `verify` is off.
    """

    def __init__(
        self,
        folder: Folder,
        *,
        count: int,
        bytes_: int,
        checksum: str,
        offsets_checksum: str | None,
        verify: bool,
    ) -> None:
        self._folder, self._count, self._bytes, self._verify = folder, count, bytes_, verify
        self._checksum, self._offsets_checksum = checksum, offsets_checksum
        for name, expected in ((PROMPTS_FILE, bytes_), (OFFSETS_FILE, 8 * (count + 1))):
            found = folder.size(name) or 0
            if found != expected:
                raise self._damage(name, f"has {found} bytes, expected {expected}")

    def __len__(self) -> int:
        return self._count

    @cached_property
    def _offsets(self) -> npt.NDArray[np.uint64]:
        # Not to the end: after an extension, the files begin with their former content.
        data = self._folder.read(OFFSETS_FILE, 0, 8 * (self._count + 1))
        if self._offsets_checksum is not None and (found := xxh3_128(data)) != self._offsets_checksum:
            raise self._damage(OFFSETS_FILE, f"has checksum {found}, expected {self._offsets_checksum}")
        if self._verify:
            self._check_lines()
        offsets = np.frombuffer(data, dtype="<u8")
        if len(offsets) != self._count + 1 or offsets[0] != 0 or (offsets[1:] < offsets[:-1]).any():
            raise self._damage(OFFSETS_FILE, "has offsets that are not ascending")
        return offsets

    def _check_lines(self) -> None:
        begins = range(0, self._bytes, _PIECE_BYTES)
        parts = (self._folder.read(PROMPTS_FILE, i, min(i + _PIECE_BYTES, self._bytes)) for i in begins)
        if (found := xxh3_128_of_parts(parts)) != self._checksum:
            raise self._damage(PROMPTS_FILE, f"has checksum {found}, expected {self._checksum}")

    def __getitem__(self, index):  # type: ignore[no-untyped-def]  # one prompt or a slice of them
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._count))]
        if not -self._count <= index < self._count:
            raise IndexError(index)
        index %= self._count
        begin, end = int(self._offsets[index]), int(self._offsets[index + 1])
        return self._parse(self._folder.read(PROMPTS_FILE, begin, end), index)

    def __iter__(self) -> Iterator[Prompt]:
        data = self._folder.read(PROMPTS_FILE, 0, self._bytes)
        if (found := xxh3_128(data)) != self._checksum:
            raise self._damage(PROMPTS_FILE, f"has checksum {found}, expected {self._checksum}")
        # Not splitlines(): a prompt may have characters that it treats as line ends.
        for index, line in enumerate(data.split(b"\n")[:-1]):
            yield self._parse(line, index)

    def _damage(self, name: str, what: str) -> DamagedCacheError:
        return DamagedCacheError(
            f"{self._folder}/{name} {what}: the prompts of this cache are damaged; rerun the build command to "
            f"rewrite them, or copy the file from another copy of the cache"
        )

    def _parse(self, line: bytes, index: int) -> Prompt:
        try:
            record = json.loads(line)
            return Prompt(
                id=record["id"],
                text=record["text"],
                sources=tuple(record["sources"]),
                token_ids=tuple(record["token_ids"]),
            )
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise self._damage(PROMPTS_FILE, f"has a prompt {index} that cannot be read ({error})") from error

    def find(self, text: str) -> int:
        """The index of a prompt by its text; NotInCacheError if it is not in the cache."""
        wanted = prompt_id(text)
        for index, prompt in enumerate(self):
            if prompt.id == wanted:
                return index
        raise NotInCacheError(f"no prompt {text!r} in {self._folder}: search with `inspect show CACHE --grep WORD`")

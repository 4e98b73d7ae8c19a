"""Digests: canonical JSON for records, xxh3_128 for the files of a cache, sha256 for weights."""

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import xxhash

from secondcast.storage_schemas.io.hash_memory import remembered_sha256

# A hub download is a link to a blob that is named by the sha256 of its content.
_HUB_BLOB = re.compile(r"[0-9a-f]{64}")


def canonical_json(value: Any) -> bytes:
    """Canonical JSON of a value: sorted keys, no spaces, UTF-8, no NaN."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode()


def digest(value: Any) -> str:
    """blake2b (128 bit, hex) of the canonical JSON of a value."""
    return hashlib.blake2b(canonical_json(value), digest_size=16).hexdigest()


def xxh3_128(data: bytes | memoryview) -> str:
    """xxh3_128 (hex) of a byte string: the checksum of every file that a commit record names."""
    return xxhash.xxh3_128_hexdigest(data)


def xxh3_128_of_parts(parts: Iterable[bytes]) -> str:
    """xxh3_128 (hex) of concatenated byte strings."""
    state = xxhash.xxh3_128()
    for part in parts:
        state.update(part)
    return state.hexdigest()


def weight_sha256(path: Path) -> str:
    """sha256 (hex) of a weight file; the blob name of a hub download already is it, other files are read once."""
    blob = path.resolve().name
    if _HUB_BLOB.fullmatch(blob):
        return blob
    return remembered_sha256(path, _sha256)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""JSON files with a digest of their own content."""

import json
from typing import Any

from secondcast.storage_schemas.errors import DamagedCacheError, NotACacheError
from secondcast.storage_schemas.io.digests import digest


def with_digest(body: dict[str, Any], *, indent: int | None = 1) -> bytes:
    """Readable JSON with a digest of its other keys under `digest`."""
    text = json.dumps({**body, "digest": digest(body)}, indent=indent, ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode()


def verify_digest(data: bytes, where: str, *, expected_format: str) -> dict[str, Any]:
    """The inverse of `with_digest`; NotACacheError for foreign files, DamagedCacheError for changed ones."""
    try:
        body = json.loads(data)
        stated = body.pop("digest", None)
        found_format = body.get("format")
        found = digest(body)
    # Damage can produce any JSON: lists, numbers, NaN, lone surrogates, a million brackets.
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise DamagedCacheError(
            f"{where} is not readable JSON ({len(data)} bytes): it is damaged, or not a file of this program; "
            f"copy it from another copy of the cache"
        ) from error
    if found_format != expected_format:
        raise NotACacheError(
            f"{where} has format {found_format!r}, expected {expected_format!r}: not a file of a cache"
        )
    if stated != found:
        raise DamagedCacheError(
            f"{where} has digest {found}, but states {stated}: the file was changed or damaged; "
            f"copy it from another copy of the cache"
        )
    checked: dict[str, Any] = body
    return checked

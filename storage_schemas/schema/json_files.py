"""The JSON files of a cache: records that refuse unknown keys, and a digest of a file's own content."""

import json
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict

from secondcast.storage_schemas.errors import DamagedCacheError, NotACacheError
from secondcast.storage_schemas.io.digests import digest


class Record(BaseModel):
    """A frozen record that refuses unknown keys; the base of everything written as JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def json_value(self) -> dict[str, Any]:
        """The record as plain JSON types."""
        return self.model_dump(mode="json")


def stays_inside(path: str) -> bool:
    """Whether a path stated by a file of a cache is below the cache's folder."""
    return path.isprintable() and not path.startswith(("/", "\\")) and ".." not in path.replace("\\", "/").split("/")


def _inside(files: dict[str, str]) -> dict[str, str]:
    """Validate the paths of a manifest's files; ValueError if one is outside the cache."""
    for path in files:
        if not stays_inside(path):
            raise ValueError(f"path {path!r} is outside the cache")
    return files


PathsInside = Annotated[dict[str, str], AfterValidator(_inside)]


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

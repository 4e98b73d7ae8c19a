"""Cache of the sha256 sums of large files, so that a teacher of 34 GB is not read in full at every start.

One JSON file in the user's cache folder. Invalid contents are ignored and never raise an error.
"""

import json
import os
import re
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from secondcast.storage_schemas.io import durable

CACHE_HOME_VARIABLE = "SECONDCAST_CACHE_HOME"
MEMORY_FILE = "weight_hashes.json"
# A file changed twice within the clock's resolution may keep its time: only files this old are remembered.
RESTED_SECONDS = 10.0
_SHA256 = re.compile(r"[0-9a-f]{64}")


def remembered_sha256(path: Path, compute: Callable[[Path], str]) -> str:
    """The sha256 (hex) of a file: remembered while its size, times and inode are unchanged, else computed."""
    name, state = str(path.resolve()), _state(path)
    known = _read()
    if (entry := known.get(name)) is not None and entry.get("state") == state:
        return str(entry["sha256"])
    sha256 = compute(path)
    rested = time.time() - max(path.stat().st_mtime, path.stat().st_ctime) > RESTED_SECONDS
    if rested and _state(path) == state:
        # Read again: another process may have remembered other files in the meantime.
        _write({**_read(), name: {"state": state, "sha256": sha256}})
    return sha256


def memory_file() -> Path | None:
    """The file of sums, in SECONDCAST_CACHE_HOME, XDG_CACHE_HOME/secondcast or ~/.cache/secondcast."""
    if own := os.environ.get(CACHE_HOME_VARIABLE):
        return Path(own) / MEMORY_FILE
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared) / "secondcast" / MEMORY_FILE
    try:
        return Path.home() / ".cache" / "secondcast" / MEMORY_FILE
    except RuntimeError:
        return None


def _state(path: Path) -> list[int]:
    found = path.stat()
    # The change time is included because, unlike the modification time, copying tools do not set it.
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def _read() -> dict[str, dict[str, Any]]:
    file = memory_file()
    try:
        entries = json.loads(file.read_bytes()) if file is not None else {}
        return {name: entry for name, entry in entries.items() if _is_entry(entry)}
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, dict) and _SHA256.fullmatch(str(entry.get("sha256"))) is not None


def _is_there(name: str) -> bool:
    # Unknown, for example, in a folder that this user cannot read.
    with suppress(OSError):
        return Path(name).exists()
    return False


def _write(entries: dict[str, dict[str, Any]]) -> None:
    file = memory_file()
    there = {name: entry for name, entry in entries.items() if _is_there(name)}
    if file is not None:
        with suppress(OSError):
            durable.replace(file, (json.dumps(there, indent=1) + "\n").encode())

"""Makes foreign text (prompts, file names, messages of libraries) safe to print on a terminal."""

import json
import re
from typing import Any

# C0 and C1 controls, which a terminal executes, and characters that reorder or break a line: Unicode's separators and
# the embeddings, overrides and isolates of its bidirectional algorithm.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
# JSON escapes C0 itself; a lone surrogate has no bytes in UTF-8.
_IN_JSON = re.compile("[\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str, *, encoding: str = "utf-8") -> str:
    r"""A text as one line, with control characters (\x1b) and characters missing in the encoding (\u4e2d) escaped."""
    shown = _CONTROL.sub(lambda found: repr(found[0])[1:-1], text)
    return shown.encode(encoding, "backslashreplace").decode(encoding)


def printable_json(value: Any, *, encoding: str = "utf-8") -> str:
    """Readable JSON, with every Unicode character that the encoding has; it parses to the same value."""
    text = json.dumps(value, indent=1, ensure_ascii=not encoding.lower().startswith("utf"))
    return _IN_JSON.sub(lambda found: f"\\u{ord(found[0]):04x}", text)

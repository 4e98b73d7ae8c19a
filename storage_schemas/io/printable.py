"""Text of others (prompts, file names, messages of libraries) as it may go to a terminal."""

import json
import re
from typing import Any

# C0 and C1 controls, which a terminal obeys, and what reorders a line or breaks it in two: Unicode's separators and
# the embeddings, overrides and isolates of its bidirectional algorithm.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
# JSON escapes C0 by itself; half of a surrogate pair has no bytes in UTF-8.
_IN_JSON = re.compile("[\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str, *, encoding: str = "utf-8") -> str:
    r"""A text as one line, with control characters written out (\x1b), and what an encoding does not have (\u4e2d)."""
    shown = _CONTROL.sub(lambda found: repr(found[0])[1:-1], text)
    return shown.encode(encoding, "backslashreplace").decode(encoding)


def printable_json(value: Any, *, encoding: str = "utf-8") -> str:
    """JSON with all of Unicode where an encoding has it, for people to read; any reader gets the same value back."""
    text = json.dumps(value, indent=1, ensure_ascii=not encoding.lower().startswith("utf"))
    return _IN_JSON.sub(lambda found: f"\\u{ord(found[0]):04x}", text)

"""The pages of `inspect report` and of a run: self-contained HTML files that load nothing. Does not import torch."""

import hashlib
import html
import json
import math
import re
from base64 import b64encode
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from secondcast.storage_schemas.io.digests import digest
from secondcast.storage_schemas.io.folders import is_remote

_PAGE = Path(__file__).parents[1] / "page"
# Concatenated in this order: later files use earlier ones.
SCRIPTS = (
    "elements.js", "view.js", "rows.js", "charts.js", "histograms.js", "table.js", "strips.js", "pictures.js",
    "detail.js", "heat.js", "students.js", "report.js",
)  # fmt: skip

RUN_SCRIPTS = ("elements.js", "charts.js", "run.js")

_RUN_MARK = "run"
_CACHE = re.compile(rb'<meta name="secondcast-report" content="(\w+)">')
# The element is in the head of the page, before style and data.
_HEAD_BYTES = 4096


def render(data: dict[str, Any]) -> str:
    """Render the report of a cache as one self-contained HTML text, to be written as UTF-8.

    data: plain JSON types; numbers that are not finite become null. The content security policy only allows the page's
    own script and style, by their hashes, and embedded images.
    """
    return _rendered("report.html", SCRIPTS, data, mark=cache_id(str(data["cache"])))


def render_run(data: dict[str, Any]) -> str:
    """Render the report of a run; see render."""
    return _rendered("run.html", RUN_SCRIPTS, data, mark=_RUN_MARK)


def is_of_run(page: bytes) -> bool:
    """Whether a page was made by `render_run`."""
    return cache_id_of(page) == _RUN_MARK


def _rendered(name: str, scripts: Sequence[str], data: dict[str, Any], *, mark: str) -> str:
    style = (_PAGE / "report.css").read_text(encoding="utf-8")
    script = "\n".join((_PAGE / file).read_text(encoding="utf-8") for file in scripts)
    parts = {
        "policy": _policy(style, script),
        "title": html.escape(str(data["title"])),
        "mark": mark,
        "style": style,
        "script": script,
        "data": json_in_html(data),
    }
    template = (_PAGE / name).read_text(encoding="utf-8")
    # In one pass, so that placeholders inside the data stay text.
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], template)


def cache_id(location: str) -> str:
    """Identifier of the cache on a page, so that a later report of the same cache may replace it; reveals no path."""
    return digest(location if is_remote(location) else str(Path(location).resolve()))


def cache_id_of(page: bytes) -> str | None:
    """The cache identifier of a page made by `render`; None for any other file."""
    found = _CACHE.search(page[:_HEAD_BYTES])
    return None if found is None else found[1].decode()


def json_in_html(value: Any) -> str:
    """JSON that is safe inside HTML: without "<", and without lone surrogates, which UTF-8 cannot encode."""
    try:
        text = _dumped(value)
    except ValueError:
        text = _dumped(_finite(value))
    return re.sub("[<\ud800-\udfff]", lambda found: f"\\u{ord(found[0]):04x}", text)


def _dumped(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _policy(style: str, script: str) -> str:
    return (
        f"default-src 'none'; img-src data:; style-src {_source(style)}; script-src {_source(script)}; "
        f"base-uri 'none'; form-action 'none'"
    )


def _source(text: str) -> str:
    return f"'sha256-{b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

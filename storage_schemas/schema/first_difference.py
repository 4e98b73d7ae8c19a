"""First difference of two JSON values for a one-line message: path of the field and both values, uncut around it."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from secondcast.storage_schemas.io.digests import canonical_json

_LONGEST = 160
_SHORT_LIST = 60
# Characters of a long text shown before the first difference, and from there on.
_BEFORE, _AFTER = 30, 100


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A field by its path (`prompts.segments[0].samples_per_prompt`) and both values as JSON, null where absent."""

    path: str
    one: str
    other: str


def differing_leaves(one: Any, other: Any, path: str) -> Iterator[Difference]:
    """Each differing value inside two JSON values, in the order of the first."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in [*one, *(key for key in other if key not in one)]:
            yield from differing_leaves(one.get(key), other.get(key), f"{path}.{key}" if path else str(key))
    elif isinstance(one, list) and isinstance(other, list) and not (_is_short(one) and _is_short(other)):
        for number, (ours, theirs) in enumerate(zip_longest(one, other)):
            yield from differing_leaves(ours, theirs, f"{path}[{number}]")
    elif (texts := (_text(one), _text(other)))[0] != texts[1]:
        shown = _windows(*texts)
        yield Difference(path=path, one=shown[0], other=shown[1])


def first_difference(one: Any, other: Any, path: str) -> Difference:
    """The first differing leaf; for equal values, both in full."""
    return next(differing_leaves(one, other, path), Difference(path=path, one=_text(one), other=_text(other)))


def _is_short(values: list[Any]) -> bool:
    """Whether a list is short enough to show whole, like that of guidance scales."""
    return not any(isinstance(value, (list, dict)) for value in values) and len(_text(values)) <= _SHORT_LIST


def _text(value: Any) -> str:
    return canonical_json(value).decode()


def _windows(one: str, other: str) -> tuple[str, str]:
    """Both texts around the first differing character, or in full where they are short."""
    same = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    begin = max(0, same - _BEFORE)
    return _window(one, begin, same + _AFTER), _window(other, begin, same + _AFTER)


def _window(text: str, begin: int, end: int) -> str:
    if len(text) <= _LONGEST:
        return text
    return f"{'...' if begin else ''}{text[begin:end]}{'...' if end < len(text) else ''}"

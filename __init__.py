"""Distill the text encoder of a text-to-image model into a small one: record the teacher, train from the recording."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from secondcast.storage_schemas.reader import Cache as Cache

__version__ = "0.1.0"
_EXPORTS = {"Cache": "secondcast.storage_schemas.reader"}
__all__ = ["Cache", "__version__"]


def __getattr__(name: str) -> Any:
    """Import an export when it is first used, so that `import secondcast` loads no library."""
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'secondcast' has no attribute {name!r}")

"""Packages that diffusers and transformers import whenever they are installed: quantizers and peft.

Importing them takes seconds, and on some processors bitsandbytes prints a warning about its kernels. The command line
hides them until weights are quantized, or a LoRA is read; a program that imports secondcast is not affected.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version

QUANTIZERS = {"int8": "torchao", "fp8": "torchao", "nf4": "bitsandbytes"}
"""The package for each kind of quantized weights."""
_PEFT = "peft"
_HIDDEN = (*dict.fromkeys(QUANTIZERS.values()), _PEFT)
_hidden_now: set[str] = set()


@contextmanager
def hidden_packages() -> Iterator[None]:
    """Hide these packages from diffusers and transformers if those are imported within the context."""
    for package in _HIDDEN:
        if package not in sys.modules:
            # None: find_spec finds nothing, and an import raises ModuleNotFoundError.
            sys.modules[package] = None  # type: ignore[assignment]  # documented for sys.modules
            _hidden_now.add(package)
    try:
        yield
    finally:
        for package in _HIDDEN:
            _show(package)


def show_quantizer(kind: str) -> None:
    """Make the package of a kind of weights importable again."""
    _show(QUANTIZERS[kind])


def show_peft() -> None:
    """Make peft importable again, before diffusers is imported, which looks for it once."""
    _show(_PEFT)


def _show(package: str) -> None:
    if package in _hidden_now:
        _hidden_now.remove(package)
        if sys.modules.get(package, package) is None:
            del sys.modules[package]


def installed_version(kind: str) -> str | None:
    """The version of the package of a kind of weights, hidden or not; None if it is not installed."""
    try:
        return version(QUANTIZERS[kind])
    except PackageNotFoundError:
        return None

"""`secondcast --version`: versions to include in a bug report."""

import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

REQUIRED = ("secondcast", "torch", "diffusers", "transformers", "zarr", "numcodecs", "webdataset")
OPTIONAL = (
    "beautifulsoup4", "bitsandbytes", "datasets", "ftfy", "matplotlib", "obstore", "onnxruntime", "peft", "pyarrow",
    "pyyaml", "rapidocr", "ray", "scikit-image", "scikit-learn", "spacy", "tensorboard", "torchao", "torchmetrics",
    "torchvision", "wandb", "wordfreq",
)  # fmt: skip


def version_lines() -> Iterator[str]:
    """Name and version of each library, without importing it; optional libraries only if installed."""
    named = [(name, _version(name) or "not installed") for name in REQUIRED]
    named.insert(1, ("python", f"{platform.python_version()} ({platform.system()} {platform.machine()})"))
    named += [(name, found) for name in OPTIONAL if (found := _version(name)) is not None]
    width = max(len(name) for name, _ in named)
    return (f"{name:<{width}}  {found}" for name, found in named)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None

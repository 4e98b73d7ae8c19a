"""`secondcast --version`: what a report of an error should say of the installation."""

import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

REQUIRED = ("secondcast", "torch", "diffusers", "transformers", "zarr", "numcodecs", "webdataset")
OPTIONAL = (
    "bitsandbytes", "datasets", "matplotlib", "obstore", "peft", "pyarrow", "pyyaml", "ray", "scikit-image",
    "scikit-learn", "tensorboard", "torchao", "torchmetrics", "torchvision", "wandb", "wordfreq",
)  # fmt: skip


def version_lines() -> Iterator[str]:
    """Lines of a name and a version, by what is installed (nothing is imported); optional libraries if they are."""
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

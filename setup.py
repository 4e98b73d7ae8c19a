"""The packages lie in the repository root and are installed below `secondcast`; all else is in pyproject.toml."""

from setuptools import find_packages, setup

SHIPPED = ("cache_builder", "commands", "evaluation", "inspection", "models", "pocket", "storage_schemas", "trainer")

setup(
    package_dir={"secondcast": "."},
    packages=[
        "secondcast",
        "secondcast.recipes",
        *(
            f"secondcast.{name}"
            for top in SHIPPED
            for name in [top, *(f"{top}.{below}" for below in find_packages(top))]
            if name != "pocket.training"
        ),
    ],
)

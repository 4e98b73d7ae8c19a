"""Print the oldest versions that pyproject.toml declares, as constraints for pip: `python .ci/oldest.py`.

Extras are left as new as pip finds them. So is torch: older wheels of it hold CUDA, several gigabytes.
"""

import re
import sys
import tomllib
from pathlib import Path

LEFT_OUT = ("torch",)
_BOUND = re.compile(r"([A-Za-z0-9_.-]+)>=([0-9][0-9.]*)")


def oldest(pyproject: Path) -> list[str]:
    """A line NAME==VERSION per dependency; ValueError for one that states no lower bound."""
    lines = []
    for dependency in tomllib.loads(pyproject.read_text())["project"]["dependencies"]:
        found = _BOUND.match(dependency)
        if found is None:
            raise ValueError(f"{dependency!r} states no oldest version: expected NAME>=VERSION")
        if found[1] not in LEFT_OUT:
            lines.append(f"{found[1]}=={found[2]}")
    return lines


if __name__ == "__main__":
    sys.stdout.writelines(f"{line}\n" for line in oldest(Path(__file__).resolve().parents[1] / "pyproject.toml"))

"""Calculated GPU memory against the simulation, as the table of docs/benchmarks.md: python -m tests.simulated_cuda."""

import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.simulated_cuda.device.shim import missing
from tests.simulated_cuda.runner import Runner
from tests.simulated_cuda.runs.rows import ROWS

HEAD = """| run | calculated | allocated | reserved | smallest GPU of the plan |
|---|---|---|---|---|"""


def line(name: str, found: dict[str, Any]) -> str:
    """A row of the table, in GiB."""
    planned, measured = found["planned"], found["measured"]
    figures = [planned["gib"], measured["allocated_gib"], measured["reserved_gib"]]
    card = f"{planned['card']}, {planned['card_gib']:g}"
    return f"| {name} | {' | '.join(f'{figure:.2f}' for figure in figures)} | {card} |"


def main() -> None:
    """Print the table, a group of rows at a time; minutes."""
    if why := missing():
        sys.exit(f"CUDA is not simulated: {why}")
    print(HEAD)
    with tempfile.TemporaryDirectory() as folder:
        runner = Runner(Path(folder))
        for group, rows in ROWS.items():
            found = runner.group(group)
            for row in rows:
                print(line(row.name, found[row.name]), flush=True)


if __name__ == "__main__":
    main()

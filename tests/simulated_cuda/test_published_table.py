"""Calculated GPU memory against the figures of the simulation in docs/benchmarks.md, without running it."""

import re
from pathlib import Path

import pytest

from tests.simulated_cuda.runs.rows import ROWS, Row

PAGE = Path(__file__).parents[2] / "docs/benchmarks.md"
LINE = re.compile(r"\| (?P<name>[^|]+) \| [\d.]+ \| (?P<allocated>[\d.]+) \| [\d.]+ \| [^|]+ \|")
SECTION = PAGE.read_text().partition("\n## GPU memory, calculated and simulated\n")[2].partition("\n## ")[0]
SIMULATED_GIB = {found["name"]: float(found["allocated"]) for found in LINE.finditer(SECTION)}
EVERY_ROW = [row for rows in ROWS.values() for row in rows]


def test_the_table_has_the_rows_that_are_simulated():
    assert list(SIMULATED_GIB) == [row.name for row in EVERY_ROW]


@pytest.mark.thorough
@pytest.mark.parametrize("row", EVERY_ROW, ids=lambda row: row.name)
def test_what_is_calculated_is_what_the_simulation_allocated(row: Row):
    assert row.planned().gib == pytest.approx(SIMULATED_GIB[row.name], rel=0.03)

"""Every snippet of docs/python.md and every cell of the notebook runs on the pocket."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/python.md"
NOTEBOOK = ROOT / "examples/first_look.ipynb"


def snippets() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)


def cells() -> list[str]:
    notebook = json.loads(NOTEBOOK.read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def run_in_order(pieces: list[str], where: Path) -> dict[str, Any]:
    """The names after all pieces, which share them as the cells of a notebook do."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, piece in enumerate(pieces, 1):
        exec(compile(piece, f"{where.name}, piece {number}", "exec"), names)
    return names


@pytest.mark.thorough
def test_the_snippets_of_the_page_run_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = run_in_order(snippets(), PAGE)
    assert len(names["losses"]) == names["run"].steps == 10
    # The caches have two held-out captions, so that the runs are validated.
    assert names["run"].validation_loss > 0 and names["own"].validation_loss > 0
    said, heard = capsys.readouterr()
    assert "1 of 2 steps\n2 of 2 steps\ncheckpoint 2 in observed\n" in said and heard == ""
    # A comment of the page states what the last snippet prints.
    assert said.splitlines()[-1] == snippets()[-1].rpartition("# ")[2].strip()


@pytest.mark.thorough
def test_the_cells_of_the_notebook_run_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = run_in_order(cells(), NOTEBOOK)
    assert names["own"].validation_loss != names["run"].validation_loss
    context = [loss for _, kind, loss in names["losses"] if kind == "context"]
    assert context[-1] < context[0]
    assert capsys.readouterr().err == ""
    # What its cell shows.
    strips = eval(next(cell for cell in cells() if cell.startswith("secondcast.film_strips")), names)
    assert isinstance(strips, Image.Image) and strips.height > 300


def test_the_notebook_is_committed_without_outputs():
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        assert not cell.get("outputs") and cell.get("execution_count") is None


def test_the_page_names_every_export():
    import secondcast

    text = PAGE.read_text() + "".join(cells())
    assert [name for name in secondcast.__all__ if name not in text and not name.startswith("__")] == []

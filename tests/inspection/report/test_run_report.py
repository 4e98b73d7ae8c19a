"""The report of a run: made of the files in its folder, and no larger for a longer run."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from secondcast.inspection.report.page import cache_id, is_of_run, render, render_run
from secondcast.inspection.report.run import PROMPTS_KEY, run_data, sample_file
from tests.inspection.report.report_data import report_data

ID = "0" * 32


def make_run(run: Path, *, sheets: int, width: int = 200) -> Path:
    """A run of 40 steps whose checkpoint at step 20 was the best, with samples every two steps."""
    stages = [{"name": "pretrain", "loss": "context", "steps": 10}, {"name": "main", "loss": "vision", "steps": 40}]
    config = {"id": ID, "settings": {"student": "pocket-small", "stages": stages}, "backbone": "pocket"}
    run.mkdir()
    (run / "config.json").write_text(json.dumps(config | {"caches": {"cache": {"location": "/data/cache"}}}))
    (run / "best.json").write_text('{"checkpoint": "checkpoint-00000020", "loss": 0.25}')
    for step in (20, 40):
        (run / f"checkpoint-{step:08d}").mkdir()
        (run / f"checkpoint-{step:08d}/state.json").write_text(json.dumps({"step": step}))
    entries = [{"step": step, "loss": 1 / (step + 1), "kind": "vision", "learning_rate": 1e-3} for step in range(40)]
    entries += [{"step": 20, "validation_loss": 0.25, "validation_loss_by_step": {"0": 0.25}}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    texts = PngInfo()
    texts.add_itxt(PROMPTS_KEY, "0: a red dog\n3: <b>a café</b>")
    for number in range(sheets):
        file = sample_file(run, 2 * number)
        file.parent.mkdir(exist_ok=True)
        Image.new("RGB", (width, 50), (number, 0, 0)).save(file, pnginfo=texts)
    return run


def test_it_has_losses_validations_samples_and_what_was_trained(tmp_path):
    data = run_data(make_run(tmp_path / "my-run", sheets=2))
    assert [curve["name"] for curve in data["curves"]] == ["loss", "validation vision loss", "learning rate"]
    assert [(one["step"], one["prompts"]) for one in data["samples"]] == [
        (step, ["0: a red dog", "3: <b>a café</b>"]) for step in (0, 2)
    ]
    assert data["facts"] == [
        ["steps", "40 of 50"],
        ["lowest validation loss", "0.25, at step 20"],
        ["student", "pocket-small"],
        ["stages", "pretrain: context loss, 10 steps; main: vision loss, 40 steps"],
        ["caches", "/data/cache"],
        ["transformer", "pocket"],
    ]
    assert data["title"] == "my-run" and data["notes"] == []


@pytest.mark.parametrize(("sheets", "shown"), [(6, [0, 2, 4, 6, 8, 10]), (21, [0, 8, 16, 24, 32, 40])])
def test_of_many_samples_the_first_the_last_and_some_between_are_shown(tmp_path, sheets, shown):
    run = make_run(tmp_path / "run", sheets=sheets, width=1040)
    (run / "samples/mine.png").write_bytes(b"")
    data = run_data(run)
    assert [one["step"] for one in data["samples"]] == shown
    noted = [f"samples of 6 of {sheets} steps; all are in {run}/samples"] if sheets > 6 else []
    assert data["notes"] == noted


def test_a_run_without_samples_or_with_an_unreadable_best_has_a_report(tmp_path):
    run = make_run(tmp_path / "run", sheets=0)
    (run / "best.json").write_text("{")
    data = run_data(run)
    assert data["samples"] == [] and "lowest validation loss" not in dict(data["facts"])


def test_the_page_holds_everything_and_is_told_from_that_of_a_cache(tmp_path):
    page = render_run(run_data(make_run(tmp_path / "run", sheets=1)))
    assert "\\u003cb>a café\\u003c/b>" in page and "<title>run: training</title>" in page
    assert not re.search(r"""(src|href)=(?!"(#|data:))""", page.split("<script")[0])
    assert not re.search(r"{{\w+}}|https?://(?!www\.w3\.org/2000/svg)", page)
    assert is_of_run(page.encode()) and not is_of_run(render(report_data()).encode()) and not is_of_run(b"mine")
    assert cache_id("run") != "run"

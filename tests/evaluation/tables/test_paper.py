"""`evaluate paper`: what is missing is made, what is there is kept, and a failed cell does not stop the others."""

import html
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from secondcast.evaluation.tables.paper import making as making_module
from secondcast.evaluation.tables.paper.results import Cell, Column, PaperRow, PaperTable, lines_of, markdown
from secondcast.models.student.student import new_student, save_student
from secondcast.models.teacher.folder import BUILD_PARTS, find_teacher
from secondcast.pocket import STUDENTS_FOLDER, TEACHER_FOLDER
from secondcast.pocket.scorer import score
from secondcast.pocket.world import captions
from secondcast.storage_schemas.io.digests import xxh3_128
from tests.commands.test_cli import secondcast
from tests.evaluation.image_metrics.tiny_networks import make_blip, make_clip
from tests.inspection.report.browser import tab
from tests.models.teacher.test_controlnet import make_controlnet

__all__ = ["tab"]

CAPTIONS = captions(5, seed=0, split="heldout")
RECIPE = """
[generate]
teacher = "pocket"
dtype = "float32"
steps = 2

[prompts.captions]
source = "captions.txt"
metrics = ["pocket"]

[prompts.twice]
source = "captions.txt"
limit = 1
samples-per-prompt = 2
metrics = ["pocket", "fid"]
reference = "teacher"

[rows.teacher]
student = "teacher"

[rows."8 bit"]
student = "teacher"
quantize-text-encoder = "int8"

[rows.tiny]
student = "tiny"

[rows.small]
student = "small"

[rows.quick]
student = "tiny"
steps = 1
"""


def make_student(folder: Path, size: str) -> None:
    teacher = find_teacher(str(TEACHER_FOLDER), BUILD_PARTS)
    recorded = teacher.identity(text_length=teacher.text_length)
    save_student(
        new_student(str(STUDENTS_FOLDER / size), recorded, init="auto", dropout=0.0, seed=0), folder, tokenizer=None
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A table without the row `small`, which has no student, and without fid, which has too few images."""
    folder = tmp_path_factory.mktemp("paper")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        (folder / "captions.txt").write_text("\n".join(CAPTIONS) + "\n")
        (folder / "table.toml").write_text(RECIPE)
        make_student(folder / "tiny", "tiny")
        code = paper()
    return folder, code


def paper(*words, out="out", capsys=None):
    asked = ("evaluate", "paper", "table.toml", "--out", out, "--device", "cpu", "--batch-size", "4", *words)
    return secondcast(*asked, capsys=capsys) if capsys else secondcast_code(*asked)


def secondcast_code(*words):
    from typer.testing import CliRunner

    from secondcast.cli import app

    return CliRunner().invoke(app, [str(word) for word in words]).exit_code


def table_of(folder: Path) -> PaperTable:
    return PaperTable.model_validate_json((folder / "out/table.json").read_bytes())


def images_of(folder: Path, row: str, prompts: str = "captions") -> Path:
    (place,) = folder.glob(f"out/images/{row}-*/{prompts}-*")
    return place


def test_cells_are_scores_of_the_images_that_generate_makes(made):
    folder, _ = made
    rows = {row.name: row for row in table_of(folder).rows}
    for name in ("teacher", "tiny", "quick"):
        place = images_of(folder, name)
        index = (place / "index.jsonl").read_text().splitlines()
        images = [json.loads(line) for line in index]
        assert [image["prompt"] for image in images] == CAPTIONS
        values = [score(np.asarray(Image.open(place / image["file"])), image["prompt"]) for image in images]
        for key, cell in rows[name].cells.items():
            if key.startswith("captions / "):
                of_dimension = [
                    value[key.rpartition(" / ")[2]] for value in values if key.rpartition(" / ")[2] in value
                ]
                assert (cell.mean, cell.count) == (pytest.approx(np.mean(of_dimension)), len(of_dimension))
    assert rows["quick"].changes == "steps 1" and rows["8 bit"].changes == ""
    assert rows["8 bit"].parameters == rows["teacher"].parameters
    assert rows["8 bit"].weight_bytes < rows["teacher"].weight_bytes
    settings = json.loads((images_of(folder, "quick") / "generate.json").read_text())
    assert settings["steps"] == 1


def test_a_failed_cell_is_said_to_have_failed_and_the_others_are_there(made):
    folder, code = made
    table = table_of(folder)
    assert code == 1
    small = next(row for row in table.rows if row.name == "small")
    assert small.parameters is None
    assert all(cell.failed.startswith("no student small: there is no such folder") for cell in small.cells.values())
    text = (folder / "out/table.md").read_text()
    assert "| small | - | - | failed |" in text and "failed (small, " in text
    fid = [row.cells["twice / fid"].failed for row in table.rows if row.name != "small"]
    assert all(fid) and all("\n" not in why for why in fid)
    tiny = next(row for row in table.rows if row.name == "tiny")
    assert all(cell.failed is None for key, cell in tiny.cells.items() if not key.endswith("fid"))


def test_given_again_it_makes_what_is_missing_and_nothing_else(made, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "again"
    shutil.copytree(made[0], folder)
    monkeypatch.chdir(folder)
    make_student(folder / "small", "small")
    before = {file: file.stat().st_mtime_ns for file in folder.glob("out/images/*/*/*.png")}
    scored = []
    real = making_module.score_folders

    def watching(metrics, folders, progress):
        scored.extend(folders)
        return real(metrics, folders, progress)

    monkeypatch.setattr(making_module, "score_folders", watching)
    old = table_of(folder)
    paper(capsys=capsys)
    assert {row for row in scored if row != "small"} <= {
        row.name for row in old.rows if row.cells["twice / fid"].failed
    }
    assert before and {file: file.stat().st_mtime_ns for file in before} == before
    new = table_of(folder)
    small = next(row for row in new.rows if row.name == "small")
    assert all(cell.failed is None for key, cell in small.cells.items() if not key.endswith("fid"))
    assert [row for row in new.rows if row.name != "small"] == [row for row in old.rows if row.name != "small"]
    assert (folder / "out/scaling.png").is_file() and (folder / "out/embeddings.png").is_file()


def test_killed_while_it_makes_images_it_resumes_to_the_same_table(made, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "killed"
    shutil.copytree(made[0], folder, ignore=shutil.ignore_patterns("out"))
    monkeypatch.chdir(folder)
    real, left = making_module.generate, [3]

    def dying(*words, **named):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return real(*words, **named)

    monkeypatch.setattr(making_module, "generate", dying)
    code, _, heard = paper(capsys=capsys)
    assert code == 130 and "images and scores are kept in out; run the same command again to resume" in heard
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    paper(capsys=capsys)
    assert table_of(folder) == table_of(made[0])


def test_the_page_shows_each_prompt_by_every_text_encoder(made):
    folder, _ = made
    page = html.unescape((folder / "out/index.html").read_text())
    sources = re.findall(r'<img src="(images/[^"]+)"', page)
    # Five captions and two samples of one, by the four rows that have images.
    assert len(sources) == len(set(sources)) == 4 * (5 + 2)
    assert all((folder / "out" / source).is_file() for source in sources)
    assert all(page.count(f"<h3>{caption}</h3>") >= 1 for caption in CAPTIONS)


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_does_not_scroll_sideways_and_loads_every_image(made, tab, width):
    tab.set_viewport_size({"width": width, "height": 900})
    tab.goto((made[0] / "out/index.html").as_uri())
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    # decode() settles when an image is there, and fails for a broken one. Playwright's wait_for_function cannot wait
    # for that: it evaluates text in the page, which the page's content security policy forbids.
    tab.evaluate("() => Promise.all([...document.images].map(i => { i.loading = 'eager'; return i.decode() }))")
    assert tab.evaluate("[...document.images].every(image => image.naturalWidth > 0)")


def test_a_column_whose_metric_was_never_run_as_published_is_marked():
    run = Column(prompts="a", metric="pocket", score="binding", as_published=True)
    columns = (run, Column(prompts="a", metric="fid", score="fid"))
    cells = {"a / binding": Cell(mean=0.5, low=0.4, high=0.6), "a / fid": Cell(mean=22.364, count=9)}
    row = PaperRow(name="s", baseline=False, changes="steps 4", parameters=10**6, weight_bytes=2**20, cells=cells)
    table = PaperTable(created_by="x", columns=columns, rows=(row,))
    assert lines_of(table) == [
        ["text encoder", "parameters", "bytes", "binding \u2191", "fid \u2193 \u2020"],
        ["s (steps 4)", "1 M", "1.0 MiB", "0.500 (0.400-0.600)", "22.36"],
    ]
    assert "\u2020 Secondcast's tests run this metric with small random networks only" in markdown(table)


def test_a_shorter_list_of_prompts_scores_none_of_the_others_and_a_broken_image_fails_its_row(
    made, tmp_path, monkeypatch, capsys
):
    folder = tmp_path / "shorter"
    shutil.copytree(made[0], folder)
    monkeypatch.chdir(folder)
    (folder / "captions.txt").write_text("\n".join(CAPTIONS[:3]) + "\n")
    sorted(images_of(folder, "tiny").glob("000001*.png"))[0].write_bytes(b"no image")
    paper(capsys=capsys)
    rows = {row.name: row for row in table_of(folder).rows}
    assert {cell.count for key, cell in rows["quick"].cells.items() if key.startswith("captions / colour")} == {3}
    assert all(
        "cannot be read" in cell.failed for key, cell in rows["tiny"].cells.items() if key.startswith("captions")
    )
    assert rows["teacher"].cells["captions / colour"].failed is None


def test_a_row_with_a_controlnet_takes_the_control_images_of_its_prompts(made, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").symlink_to(made[0] / "tiny")
    (tmp_path / "edges").symlink_to(images_of(made[0], "teacher"))
    (tmp_path / "captions.txt").write_text("\n".join(CAPTIONS) + "\n")
    (tmp_path / "other.txt").write_text(captions(1, seed=1, split="train")[0] + "\n")
    make_controlnet(tmp_path / "net", TEACHER_FOLDER)
    (tmp_path / "table.toml").write_text(
        '[generate]\nteacher = "pocket"\nsteps = 1\ndtype = "float32"\n'
        '[prompts.captions]\nsource = "captions.txt"\nmetrics = ["pocket"]\n'
        '[prompts.other]\nsource = "other.txt"\nmetrics = ["pocket"]\n'
        '[rows.tiny]\nstudent = "tiny"\n[rows.teacher]\nstudent = "teacher"\n'
        '[rows.controlled]\nstudent = "tiny"\ncontrolnet = "net"\ncontrol-images = "edges"\ncontrolnet-scale = 0.5\n'
    )
    code, _, heard = paper(capsys=capsys)
    assert code == 1, heard
    rows = {row.name: row for row in table_of(tmp_path).rows}
    assert rows["controlled"].changes == "control-images edges, controlnet net, controlnet-scale 0.5"
    for key, cell in rows["controlled"].cells.items():
        # The folder has no control image of the other prompt.
        why = None if key.startswith("captions") else "edges has no control image of prompt 0: expected 000000-"
        assert (cell.failed is None) if why is None else cell.failed.startswith(why)
    index = (images_of(tmp_path, "controlled") / "index.jsonl").read_text().splitlines()
    controls = [json.loads(line)["control"] for line in index]
    images = [(images_of(made[0], "teacher") / json.loads(line)["file"]).read_bytes() for line in index]
    assert controls == [xxh3_128(image) for image in images]


@pytest.mark.slow
def test_the_command_line_reads_a_lora_although_it_hides_peft(made, tmp_path):
    names = "transformer.transformer_blocks.0.attn.to_q.lora_{}.weight"
    save_file(
        {names.format("A"): torch.ones(2, 128), names.format("B"): torch.ones(128, 2)}, tmp_path / "l.safetensors"
    )
    recipe = RECIPE[: RECIPE.index("[prompts.twice]")] + '[rows.lora]\nstudent = "tiny"\nlora = "l.safetensors"\n'
    (tmp_path / "table.toml").write_text(recipe)
    for name in ("captions.txt", "tiny"):
        (tmp_path / name).symlink_to(made[0] / name)
    words = ["evaluate", "paper", "table.toml", "--out", "out", "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, "-m", "secondcast.cli", *words], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_a_folder_of_something_else_is_left_as_it_is(made, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(made[0])
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text("{}")
    code, _, heard = paper(out=tmp_path / "run", capsys=capsys)
    assert code == 1 and heard.startswith(f"secondcast: {tmp_path / 'run'} has 'config.json' and 0 more, but no ")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]


@pytest.mark.thorough
def test_prompts_with_several_sources_have_a_column_for_each(tmp_path, monkeypatch, capsys):
    lines = [("a red circle", "color"), ("a blue square", "color"), ("a square and a circle", "shape")]
    prompts = [json.dumps({"text": text, "source": source}) + "\n" for text, source in lines]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.jsonl").write_text("".join(prompts))
    make_clip(tmp_path / "clip", seed=1)
    make_blip(tmp_path / "blip")
    make_student(tmp_path / "tiny", "tiny")
    (tmp_path / "table.toml").write_text(
        '[generate]\nteacher = "pocket"\nsteps = 1\n'
        '[metrics]\nvqa-model = "blip"\nclip-model = "clip"\ncompbench-clip-model = "clip"\n'
        '[prompts.both]\nsource = "prompts.jsonl"\nmetrics = ["compbench", "clip-score"]\nsamples-per-prompt = 2\n'
        '[rows.tiny]\nstudent = "tiny"\n'
    )
    code, said, heard = paper(capsys=capsys)
    assert code == 0, heard
    (row,) = table_of(tmp_path).rows
    cells = {key.removeprefix("both / "): cell for key, cell in row.cells.items()}
    assert list(cells) == [
        "compbench", "color / compbench", "shape / compbench", "clip-score", "color / clip-score", "shape / clip-score",
    ]  # fmt: skip
    assert [cell.count for cell in cells.values()] == [6, 4, 2] * 2
    color, shape = cells["color / compbench"].mean, cells["shape / compbench"].mean
    assert cells["compbench"].mean == pytest.approx((color + shape) / 2)
    assert cells["clip-score"].mean == pytest.approx(
        (2 * cells["color / clip-score"].mean + cells["shape / clip-score"].mean) / 3
    )
    assert "compbench averages color, shape; it lacks " in said and "\u2020" in said

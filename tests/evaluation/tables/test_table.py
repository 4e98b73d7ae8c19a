"""Tables of text encoders: pooling, intervals, forms; and the command on the pocket."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import secondcast.evaluation.on_cache as on_cache
from secondcast.commands.evaluate.cache import check_one_form
from secondcast.commands.evaluate.table import grouped, print_scores
from secondcast.commands.evaluate.table_cache import kept_evaluation
from secondcast.commands.evaluate.table_pocket import check_one_size
from secondcast.evaluation.intervals import clustered, wilson
from secondcast.evaluation.pocket_scores import Score
from secondcast.evaluation.tables.error_table import ErrorTable
from secondcast.evaluation.tables.plots import beside, plot_embeddings
from secondcast.evaluation.tables.scored_rows import ScoredRun, keep, kept
from secondcast.evaluation.tables.table import Table, caption, cell_text, lines_of, markdown, row_of
from secondcast.models.student.student import new_student, save_student
from secondcast.models.teacher.folder import BUILD_PARTS, find_teacher
from secondcast.pocket import STUDENTS_FOLDER, TEACHER_FOLDER
from secondcast.pocket.world import captions
from secondcast.storage_schemas.errors import SettingsError
from secondcast.storage_schemas.schema.prompts import is_held_out, prompt_id
from tests.commands.test_cli import secondcast


@pytest.fixture
def pocket_export(tmp_path) -> Path:
    teacher = find_teacher(str(TEACHER_FOLDER), BUILD_PARTS)
    recorded = teacher.identity(text_length=teacher.text_length)
    student = new_student(str(STUDENTS_FOLDER / "tiny"), recorded, init="auto", dropout=0.0, seed=0)
    save_student(student, tmp_path / "student", tokenizer=None)
    return tmp_path / "student"


def score(*values: float) -> Score:
    mean = sum(values) / len(values)
    low, high = wilson(mean, len(values))
    return Score(mean=mean, count=len(values), low=low, high=high, values=values)


FIVE, SEVEN = (1.0,) * 5 + (0.0,) * 5, (1.0,) * 7 + (0.0,) * 3


def table() -> Table:
    rows = (
        row_of("teacher", 4_762_310_656, [{"colour": score(*[1.0] * 10)}]),
        row_of("a|b", 129_900_000, [{"colour": score(*FIVE)}, {"colour": score(*SEVEN)}], weight_bytes=2**20),
    )
    return Table(captions=10, steps=20, guidance=3.5, seed=0, rows=rows)


def test_runs_of_one_student_have_the_interval_of_the_captions_that_they_share():
    (cell,) = table().rows[1].cells.values()
    assert (cell.mean, cell.count, cell.interval) == (pytest.approx(0.6), 20, "bootstrap")
    assert (cell.low, cell.high) == clustered([FIVE, SEVEN])
    # As if their captions were different ones it was narrower.
    low, high = wilson(0.6, 20)
    assert cell.high - cell.low > 1.2 * (high - low)
    assert cell_text(cell) == f".60 ({cell.low:.2f}-{cell.high:.2f})".replace("0.", ".")
    (cell,) = table().rows[0].cells.values()
    assert (cell.low, cell.high, cell.interval) == (*wilson(1.0, 10), "wilson")


def test_runs_scored_by_an_earlier_version_are_pooled_and_the_table_says_so():
    record = {"asked": {}, "parameters": 3, "scores": {"colour": [0.5, 10, 0.2, 0.8]}}
    old = ScoredRun.model_validate_json(json.dumps(record)).by_dimension()
    row = row_of("old", 3, [old, {"colour": score(*SEVEN)}])
    (cell,) = row.cells.values()
    assert (cell.low, cell.high, cell.interval) == (*wilson(cell.mean, 20), "pooled")
    assert cell.mean == pytest.approx(0.6)
    found = Table(captions=10, steps=20, guidance=3.5, seed=0, rows=(row,))
    assert "too narrow) where values by caption are not stored" in caption(found)
    assert "too narrow" not in caption(table())


def test_a_table_is_text_markdown_and_json():
    head, teacher, student = lines_of(table())
    assert head == ["text encoder", "parameters", "bytes", "runs", "colour"]
    assert teacher[:4] == ["teacher", "4.76 B", "-", "1"] and student[:4] == ["a|b", "130 M", "1.0 MiB", "2"]
    lines = markdown(table()).splitlines()
    assert lines[0] == (
        "10 held-out captions, 20 sampling steps, guidance 3.5, seed 0; 95 % intervals: Wilson for one run; bootstrap "
        "over captions for several runs."
    )
    assert lines[2:4] == ["| text encoder | parameters | bytes | runs | colour |", "| --- | --- | --- | --- | --- |"]
    # A bar in a name would begin a column.
    assert lines[5].startswith(r"| a\|b | 130 M | 1.0 MiB | 2 | .60 (")
    assert Table.model_validate_json(table().model_dump_json()) == table()


def test_text_says_what_markdown_says(capsys):
    print_scores(table(), "text")
    said = capsys.readouterr().out
    assert said.splitlines()[0] == markdown(table()).splitlines()[0]
    for line in lines_of(table())[1:]:
        for cell in line[:2]:
            assert cell in said
    assert "2 runs" in said and ".60" in said


def test_runs_are_grouped_by_their_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x=y").mkdir()
    found = grouped(["small=a/1", "small=a/2", "b/run", "x=y", "large=c"])
    assert {name: [str(place) for place in places] for name, places in found.items()} == {
        "small": ["a/1", "a/2"], "run": ["b/run"], "x=y": ["x=y"], "large": ["c"],
    }  # fmt: skip
    with pytest.raises(SettingsError) as raised:
        grouped(["a/run", "b/run"])
    assert str(raised.value) == (
        "two runs are named 'run', a/run and b/run: name them, as in run-2=b/run, or give both one name if they are "
        "seeds of one student"
    )
    with pytest.raises(SettingsError) as raised:
        grouped(["small=a/1", "small=a/../a/1"])
    assert str(raised.value) == (
        "a/../a/1 is given twice as 'small': runs of one name are seeds of one student, and counting a run twice "
        "narrows the interval; give it once, or give another run"
    )
    for text, name in (("a/teacher", "teacher"), ("replay_error=a", "replay_error")):
        with pytest.raises(SettingsError) as raised:
            grouped([text])
        place = text.removeprefix("replay_error=")
        assert str(raised.value) == (
            f"{text} has the reserved name {name!r}: give it another name, as in student={place}"
        )
    with pytest.raises(SettingsError, match=r"^'small=' names no run, expected \[NAME=\]RUN, as in small=my-run$"):
        grouped(["small="])


def test_what_was_scored_before_is_kept_whole_or_not_at_all(tmp_path):
    made = ScoredRun.of({"encoder": "x"}, 3, {"colour": score(*FIVE)})
    assert kept(None, made.asked) is None and kept(tmp_path, made.asked) is None
    keep(None, made)
    keep(tmp_path, made)
    assert kept(tmp_path, made.asked) == made and made.by_dimension() == {"colour": score(*FIVE)}
    assert kept(tmp_path, {"encoder": "y"}) is None
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:20])
    assert kept(tmp_path, made.asked) is None


@pytest.mark.slow
def test_teacher_and_students_come_as_a_table_with_plots_and_stay_scored(tmp_path, pocket_export, monkeypatch, capsys):
    pytest.importorskip("torchao")
    # A folder named as the teacher is a student still.
    shutil.copytree(pocket_export, tmp_path / "teacher")
    monkeypatch.chdir(tmp_path)
    words = ["evaluate", "table", f"tiny={pocket_export}", "tiny=./teacher", "--pocket", "--num-prompts", 12]
    words += ["--steps", 2, "--out", tmp_path / "r", "--quiet"]
    code, said, heard = secondcast(*words, "--format", "json", capsys=capsys)
    found = Table.model_validate(json.loads(said))
    assert code == 0 and heard == ""
    assert [(row.name, row.runs) for row in found.rows] == [("teacher", 1), ("teacher, 8 bit", 1), ("tiny", 2)]
    assert found.rows[0].parameters == found.rows[1].parameters > found.rows[2].parameters
    stored = (pocket_export / "model.safetensors").stat().st_size
    # The pocket is stored in 16 bits: its embeddings stay, and its linears halve.
    assert found.rows[0].weight_bytes > found.rows[1].weight_bytes > found.rows[2].weight_bytes == stored
    assert found.rows[2].cells["colour"].count == 2 * found.rows[0].cells["colour"].count
    assert (tmp_path / "r/table.json").read_text() == found.model_dump_json(indent=1) + "\n"
    for name in ("scaling.png", "embeddings.png"):
        assert (tmp_path / "r" / name).read_bytes().startswith(b"\x89PNG")
    # Three text encoders, of which one has two names.
    assert len(list((tmp_path / "r/scored").iterdir())) == 3
    words.remove("--quiet")
    code, said, heard = secondcast(*words, "--format", "markdown", capsys=capsys)
    assert code == 0 and said == (tmp_path / "r/table.md").read_text()
    assert f"reused 4 of 4: teacher, teacher, 8 bit, tiny 1, tiny 2 (in {tmp_path}/r/scored)" in heard


@pytest.mark.slow
def test_on_a_cache_students_are_rows_of_distances_and_stay_evaluated(tmp_path, monkeypatch, capsys):
    cache, run = tmp_path / "cache", tmp_path / "run"
    (tmp_path / "p.txt").write_text("".join(f"{text}\n" for text in captions(64, seed=0, split="train")))
    words = ["--teacher", "pocket", "--prompts", tmp_path / "p.txt", "--steps", 2, "--batch-size", 64, "--quiet"]
    assert secondcast("build", cache, *words, capsys=capsys)[0] == 0
    words = ["--cache", cache, "--student", "pocket-tiny", "--steps", 0, "--pretrain-steps", 1, "--quiet"]
    assert secondcast("train", run, *words, capsys=capsys)[0] == 0
    shutil.copytree(run, tmp_path / "again")
    third = shutil.copytree(run, tmp_path / "third")
    (config,) = third.glob("checkpoint-*/student/config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dropout_rate": 0.5}))
    loads, load = [], on_cache.load_recorded_backbone
    monkeypatch.setattr(
        on_cache, "load_recorded_backbone", lambda *given, **named: loads.append(1) or load(*given, **named)
    )
    words = ["evaluate", "table", f"tiny={run}", f"tiny={tmp_path / 'again'}", f"other={run}"]
    words += [f"third={third}", "--cache", cache]
    words += ["--num-trajectories", 2, "--closed-loop", 1, "--out", tmp_path / "r"]
    code, said, heard = secondcast(*words, "--format", "json", capsys=capsys)
    found = ErrorTable.model_validate(json.loads(said))
    two, one, same = found.rows
    assert code == 0 and (two.name, two.runs, one.name, one.runs) == ("tiny", 2, "other", 1)
    assert two.error_fraction == one.error_fraction == pytest.approx(sum(one.by_step) / 2) and one.error_fraction > 0
    assert one.replay_error_fraction == 0 and two.records == 2 * one.records
    assert one.latent_fraction > 0 and one.ssim < 1
    assert "reused" not in heard and same.by_step == one.by_step
    # Four runs, of which two are of the first one's files.
    files = sorted((tmp_path / "r/evaluated").iterdir())
    assert len(loads) == 1 and len(files) == 2
    before = [file.stat().st_mtime_ns for file in files]
    code, said, heard = secondcast(*words, "--format", "markdown", capsys=capsys)
    assert f"reused 3 of 3: {run}, {tmp_path}/again, {third} (in {tmp_path}/r/evaluated)" in heard and len(loads) == 1
    assert code == 0 and said == (tmp_path / "r/errors.md").read_text()
    assert [file.stat().st_mtime_ns for file in files] == before
    assert f"| tiny | 2 | {100 * one.error_fraction:.2f} % | 0.00 % |" in said
    assert (tmp_path / "r/errors.png").read_bytes().startswith(b"\x89PNG")
    # Another cache of the same sampling and as many trajectories has other prompts: nothing is taken over.
    others = captions(200, seed=1, split="train")
    others.sort(key=lambda text: not is_held_out(prompt_id(text)))
    (tmp_path / "p.txt").write_text("".join(f"{text}\n" for text in others[:64]))
    build = ["--teacher", "pocket", "--prompts", tmp_path / "p.txt", "--steps", 2, "--batch-size", 64, "--quiet"]
    assert secondcast("build", tmp_path / "other", *build, capsys=capsys)[0] == 0
    words[words.index(cache)] = tmp_path / "other"
    words = [word for word in words if word != f"third={third}"]
    file = files[0]
    assert kept_evaluation(file) is not None
    file.write_text("{}")
    assert kept_evaluation(file) is None and kept_evaluation(tmp_path / "none") is None
    words += ["--pocket", "--num-prompts", 2, "--steps", 1, "--no-quantized-baseline"]
    code, said, _ = secondcast(*words, "--format", "json", capsys=capsys)
    both = json.loads(said)
    assert code == 0 and both["cache"]["cache"] == str(tmp_path / "other") and both["pocket"]["captions"] == 2
    assert len(list((tmp_path / "r/evaluated").iterdir())) == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["r"], "evaluate table needs --pocket (exact scores) or --cache CACHE (distances from the teacher)"),
        (["r", "--pocket", "--format", "pdf"], "--format is 'pdf', expected one of text, markdown, json"),
        (
            ["r", "--pocket", "--closed-loop", 2],
            "--closed-loop has no effect without --cache: remove it, or give both",
        ),
        (["r", "--pocket", "--guidance", "nan"], "--guidance is nan, expected a finite number"),
        (
            ["nowhere", "--pocket"],
            "no student nowhere: there is no such folder; give a run folder, or what `secondcast export` wrote",
        ),
    ],
)
def test_what_cannot_be_tabled_is_one_line(words, message, capsys):
    code, _, heard = secondcast("evaluate", "table", *words, "--num-prompts", 2, "--steps", 1, capsys=capsys)
    assert code == 1 and heard.strip().splitlines()[-1] == f"secondcast: {message}"


def test_runs_of_one_name_have_weights_of_one_form(tmp_path):
    for name, config in {"plain": {}, "nf4": {"quantization": "nf4"}}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": "secondcast_student", **config}))
        (tmp_path / name / "model.safetensors").touch()
    check_one_form({"a": [tmp_path / "plain"], "b": [tmp_path / "nf4"]})
    with pytest.raises(SettingsError) as error:
        check_one_form({"a": [tmp_path / "plain", tmp_path / "nf4"]})
    assert str(error.value) == (
        "the runs named 'a' have floating-point and nf4 weights: runs of one name are seeds of one student; give "
        "another name to each form"
    )


def test_runs_of_one_name_are_of_one_size():
    check_one_size("tiny", [3, 3])
    with pytest.raises(SettingsError) as raised:
        check_one_size("tiny", [4, 3, 4])
    assert str(raised.value) == (
        "the runs named 'tiny' have 3 and 4 parameters: runs of one name are seeds of one student; give another name "
        "to each size"
    )


@pytest.mark.thorough
def test_two_texts_by_one_encoder_have_a_map():
    picture = plot_embeddings({"teacher": np.eye(1, 3), "student": np.ones((1, 3))})
    assert picture.startswith(b"\x89PNG")


def test_rows_of_one_size_lie_beside_one_another_around_it():
    assert beside([5, 7]) == [5, 7]
    (low, middle, high), other = beside([100, 100, 100]), beside([100, 3, 100])
    assert low < middle == 100 < high and middle**2 == pytest.approx(low * high)
    assert other[0] < 100 < other[2] and other[1] == 3


def test_a_table_takes_its_flags_from_a_file(tmp_path, capsys):
    (tmp_path / "t.toml").write_text('pocket = true\nformat = "pdf"\n')
    code, _, heard = secondcast("evaluate", "table", "r", "--config", tmp_path / "t.toml", capsys=capsys)
    assert code == 1 and heard == "secondcast: --format is 'pdf', expected one of text, markdown, json\n"

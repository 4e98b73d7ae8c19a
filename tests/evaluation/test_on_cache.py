"""Students on one bench share its backbone and its replay error; what the open loop found outlives the closed loop."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import secondcast.evaluation.on_cache as on_cache
from secondcast.evaluation.on_cache import CacheEvaluator, evaluate_on_cache
from secondcast.evaluation.results import Evaluation
from secondcast.evaluation.settings.cache_scoring import CacheScoring, steps_of_text
from secondcast.models.student.student import load_student, save_student, untrained_like
from secondcast.storage_schemas.errors import NonFiniteError, SettingsError, StudentError
from secondcast.storage_schemas.progress import Silent
from secondcast.storage_schemas.reader import Cache
from tests.commands.test_cli import secondcast
from tests.evaluation.recorded import CPU, ROWS, replayed
from tests.trainer.test_train import Listening

pytest.importorskip("skimage")
ROOT = Path(__file__).resolve().parents[2]
FEW = CacheScoring.from_flags(num_trajectories=2, closed_loop=1, batch_size=ROWS, timesteps=(0, 2))


@pytest.fixture(scope="module")
def other(tmp_path_factory, student):
    folder = tmp_path_factory.mktemp("other") / "s"
    save_student(untrained_like(load_student(student), seed=1), folder, tokenizer=None)
    return folder


@pytest.fixture
def words(student, recorded, dev_teacher):
    flags = ["--num-trajectories", 2, "--closed-loop", 1, "--batch-size", ROWS, "--device", "cpu"]
    return ["evaluate", "score", student, "--cache", recorded, "--backbone", dev_teacher, *flags]


def counting(monkeypatch, name: str, owner=on_cache) -> list:
    calls, real = [], getattr(owner, name)

    def counted(*given, **named):
        calls.append(given)
        return real(*given, **named)

    monkeypatch.setattr(owner, name, counted)
    return calls


@pytest.mark.thorough
def test_students_on_one_bench_load_the_backbone_once_and_replay_the_teacher_once(
    student, other, recorded, dev_teacher, monkeypatch
):
    def alone(place) -> Evaluation:
        return evaluate_on_cache(place, Cache.open(recorded), replayed(dev_teacher), FEW, device=CPU, progress=Silent())

    expected = [alone(place) for place in (student, other)]
    loads = counting(monkeypatch, "load_recorded_backbone")
    decoders = counting(monkeypatch, "load", owner=on_cache.ImageDecoder)
    opened, led = counting(monkeypatch, "open_loop"), counting(monkeypatch, "closed_loop")
    heard = Listening()
    bench = CacheEvaluator.open(Cache.open(recorded), replayed(dev_teacher), FEW, device=CPU, progress=heard)
    assert not loads
    assert [bench.evaluate(place) for place in (student, other)] == expected
    assert expected[0].errors != expected[1].errors and expected[0].replay_error == expected[1].replay_error
    assert len(loads) == 1 and len(decoders) == 1
    assert [list(call[2]) for call in opened] == [["student", "replay_error"], ["student"]]
    assert [list(call[3]) for call in led] == [["student", "teacher"], ["student"]]
    assert len([line for line in heard.heard if line.startswith("no LPIPS")]) == 1


def test_a_student_that_does_not_fit_is_refused_before_the_backbone_is_loaded(
    tmp_path, recorded, dev_teacher, monkeypatch
):
    loads = counting(monkeypatch, "load_recorded_backbone")
    bench = CacheEvaluator.open(Cache.open(recorded), replayed(dev_teacher), FEW, device=CPU, progress=Silent())
    with pytest.raises(StudentError, match=r"^no student .*/none: "):
        bench.evaluate(tmp_path / "none")
    assert not loads


def test_a_student_with_other_pieces_under_the_token_ids_of_the_cache_is_refused(
    tmp_path, student, recorded, dev_teacher
):
    shutil.copytree(student, tmp_path / "s")
    tokenizer = json.loads((recorded / "tokenizer/tokenizer.json").read_bytes())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary[3:5] = vocabulary[4:2:-1]
    (tmp_path / "s/tokenizer.json").write_text(json.dumps(tokenizer))
    bench = CacheEvaluator.open(Cache.open(recorded), replayed(dev_teacher), FEW, device=CPU, progress=Silent())
    with pytest.raises(
        StudentError, match=r"/s has the piece '.*' as token id 3, .*: evaluate it on a cache of its own"
    ):
        bench.evaluate(tmp_path / "s")


def overflows(*given, **named):
    raise NonFiniteError("the final latent is not finite")


def interrupts(*given, **named):
    raise KeyboardInterrupt


@pytest.mark.thorough
def test_the_open_loop_is_written_and_printed_before_the_closed_loop_fails(tmp_path, words, monkeypatch, capsys):
    monkeypatch.setattr(on_cache, "closed_loop", overflows)
    file = tmp_path / "r.json"
    code, said, heard = secondcast(*words, "--out", file, capsys=capsys)
    found = Evaluation.read(file)
    assert code == 1 and heard.strip().splitlines()[-1] == "secondcast: the final latent is not finite"
    assert found.closed_loop is None and len(found.errors.mean_square) == 2
    assert "the 2 prompts with the largest errors:" in said and "closed loop" not in said


@pytest.mark.thorough
def test_an_interruption_says_what_of_the_evaluation_stays(tmp_path, words, monkeypatch, capsys):
    file = tmp_path / "r.json"

    def last(*more) -> str:
        code, _, heard = secondcast(*words, *more, capsys=capsys)
        assert code == 130
        return heard.strip().splitlines()[-1]

    monkeypatch.setattr(on_cache, "closed_loop", interrupts)
    assert last("--out", file) == (
        f"secondcast: interrupted: {file} has the errors by step but no closed loop; the same command starts over"
    )
    assert Evaluation.read(file).closed_loop is None
    assert last("--json") == (
        "secondcast: interrupted: nothing is kept, and the same command starts over; give --out FILE.json to keep the "
        "errors by step"
    )
    monkeypatch.setattr(on_cache, "open_loop", interrupts)
    assert last("--out", tmp_path / "s.json") == (
        f"secondcast: interrupted: nothing is written to {tmp_path}/s.json yet, and the same command starts over"
    )


def test_a_step_that_is_named_twice_is_refused():
    assert steps_of_text("7,0") == (7, 0)
    with pytest.raises(SettingsError) as raised:
        steps_of_text("0,0,7")
    assert str(raised.value) == "--timesteps is '0,0,7', which has step 0 twice: give each step once"


def test_flags_that_do_nothing_beside_others_are_one_line(words, student, capsys):
    for more, said in (
        (
            ["--random-baseline", "--closed-loop", 0],
            "--random-baseline is given with --closed-loop 0, but the baseline is only sampled in the closed loop: "
            "remove one of the two",
        ),
        (
            ["--seed", 3],
            "--seed has no effect without --pocket or --random-baseline: remove it, or give both",
        ),
    ):
        code, _, heard = secondcast(*words, *more, capsys=capsys)
        assert code == 1 and heard == f"secondcast: {said}\n"


WITHOUT_TORCH = """
import contextlib, json, sys
from secondcast import cli
import secondcast.evaluation.tables.error_table, secondcast.evaluation.tables.plots
for words in json.loads(sys.argv[1]):
    sys.argv = ["secondcast", *words]
    with contextlib.suppress(SystemExit):
        cli.main()
    loaded = {"torch", "transformers", "diffusers"} & sys.modules.keys()
    assert not loaded, (words, loaded)
"""


@pytest.mark.slow
def test_what_files_and_flags_tell_is_told_without_torch(student, recorded, tmp_path):
    score, table = ["evaluate", "score"], ["evaluate", "table"]
    on = ["--cache", str(recorded)]
    lines = {
        "--timesteps has step 9, ": [*score, str(student), *on, "--timesteps", "9"],
        "no student nowhere: ": [*score, "nowhere", *on],
        "no student gone: ": [*table, f"a={student}", "b=gone", *on],
        "no student away: ": [*score, "away", "--pocket"],
        "no-cache is not a folder": [*score, str(student), "--cache", "no-cache"],
        "x-cache is not a folder": [*table, str(student), "--cache", "x-cache"],
        "quantize is int8 with gpu-blocks 0": [
            *score, str(student), *on, "--quantize", "int8", "--gpu-blocks", "0",
        ],
        "no folder none: ": ["evaluate", "images", "none"],
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, json.dumps(list(lines.values()))],
        cwd=ROOT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    heard = done.stderr.splitlines()
    assert len(heard) == len(lines)
    for said, line in zip(lines, heard, strict=True):
        assert said in line

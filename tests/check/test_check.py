"""A whole check at tiny size: all rows hold; one that was stopped takes up the rows that it has."""

import json
from dataclasses import replace

import pytest

from secondcast.check.check import Check, empty_results
from secondcast.check.machine import beside_plan
from secondcast.check.results import CheckResults, CheckRow
from secondcast.check.teachers import FULL, RANDOM, RandomTeacher
from secondcast.models.cost.gpu_memory import CUDA_BYTES, GpuMemory
from secondcast.models.teacher.planned import planned_teacher
from secondcast.storage_schemas.progress import Silent
from tests.check.conftest import CPU, pocket, random_pocket, run_check

ON_A_GPU_ONLY = {"picture: large, offloaded", "train: compiled"}
WITHOUT_FILES = {"embedding", "weights"}


@pytest.mark.parametrize(
    ("teacher", "left_out"),
    [
        pytest.param(pocket, set(), marks=pytest.mark.thorough),
        pytest.param(random_pocket, WITHOUT_FILES, marks=pytest.mark.slow),
    ],
)
def test_every_row_holds_on_a_cpu(tmp_path, teacher, left_out):
    pytest.importorskip("torchao")
    pytest.importorskip("bitsandbytes")
    results = run_check(tmp_path, teacher())
    found = {row.name: row.result for row in results.rows}
    assert {name for name, result in found.items() if result == "not run"} == ON_A_GPU_ONLY
    assert left_out.isdisjoint(found)
    assert results.broken == ()
    assert found["offline step"] == found["resume"] == found["sample: all blocks streamed"] == "holds"
    assert all("bit for bit" in row.detail for row in results.rows if row.name.startswith("sample: "))
    timed = [row for row in results.rows if row.name.startswith("train: ") and row.result != "not run"]
    assert len(timed) == 10 and all(row.step_seconds > 0 and row.matrix_rate_fraction > 0 for row in timed)
    # On a CPU there is no memory of a GPU to measure.
    assert all(row.peak_bytes is None for row in results.rows)


@pytest.mark.slow
def test_a_stopped_check_keeps_its_rows_and_takes_up_the_rest(tmp_path):
    kept = []

    def stop_after_two(results, row):
        kept.append(results)
        if row.name == "offline step":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_check(tmp_path, pocket(), keep=stop_after_two)
    before = kept[-1]
    assert before.rows[-1].name == "offline step"
    made = []
    results = run_check(tmp_path, pocket(), before, keep=lambda results, row: made.append(row.name))
    assert not set(made) & {row.name for row in before.rows}
    assert results.rows[: len(before.rows)] == before.rows and len(results.rows) == len(before.rows) + len(made)


def test_a_row_that_would_not_end_in_time_is_left_out(tmp_path):
    results = run_check(tmp_path, pocket(), minutes=1e-9)
    assert {row.result for row in results.rows} == {"not run"}
    assert results.row("pipeline").detail == "it would exceed --minutes 1e-09"
    assert not (tmp_path / "cache").exists()


@pytest.mark.thorough
def test_rows_of_the_full_size_are_estimated_before_they_are_made(tmp_path):
    folder = replace(planned_teacher(RANDOM["random-flux"])[0], source="random-flux")
    teacher = RandomTeacher(folder, FULL, CPU)
    machine = empty_results(pocket()).machine.model_copy(update={"matrix_flops_per_second": 7e14})
    results = CheckResults(version="0", date="", teacher="random-flux", machine=machine)
    parts = list(Check(teacher, tmp_path, results, print)._parts(Silent()))
    names = {name for part in parts for name in part.names}
    assert names == {row.name for row in run_check(tmp_path, pocket(), minutes=1e-9).rows} - WITHOUT_FILES
    # On an H100 all of it takes about a quarter of an hour: the last rows may be left to a second call.
    assert 300 < sum(part.seconds for part in parts) < 1200
    assert json.loads((tmp_path / "student" / "config.json").read_text())["num_layers"] == 12


def test_a_random_text_encoder_has_as_many_weights_as_the_one_on_disk():
    made, loaded = (teacher.text_encoder().model for teacher in (random_pocket(), pocket()))
    # T5's token embedding has two names.
    assert made.shared.weight is made.encoder.embed_tokens.weight
    counts = [sum(weight.numel() for weight in network.parameters()) for network in (made, loaded)]
    assert counts[0] == counts[1]


def test_an_error_of_a_row_is_its_result(tmp_path):
    teacher = pocket()
    teacher.text_encoder = lambda: 1 // 0
    results = run_check(tmp_path, teacher)
    row = results.row("pipeline")
    assert row.result == "broken" and row.detail.startswith("failed with ZeroDivisionError: ")
    assert results.row("train: plain").detail == "the cache of the check is not complete: see the rows before"


def test_a_peak_above_the_plan_and_its_margin_is_broken():
    planned = GpuMemory(weights_bytes=9 * 2**30, student_bytes=0, sample_bytes=2**30, batch_size=1)
    row = CheckRow(name="a", result="holds", detail="bit for bit")
    inside = beside_plan(row, 10 * 2**30, 11 * 2**30, planned)
    assert (inside.result, inside.planned_bytes) == ("holds", planned.total_bytes - CUDA_BYTES)
    outside = beside_plan(row, 11 * 2**30, 11 * 2**30, planned)
    assert (outside.result, outside.detail) == ("broken", "bit for bit; the peak exceeds the plan and its margin")
    assert beside_plan(row, 2**40, 2**40, None).result == "holds"


def test_the_machine_is_compared_but_not_its_measured_rates():
    here = empty_results(pocket()).machine
    faster = here.model_copy(update={"matrix_flops_per_second": 1e15})
    assert here.differs_from(faster) is None
    other = here.model_copy(update={"torch": "1.0"})
    assert other.differs_from(here) == f"torch is 1.0, was {here.torch}"

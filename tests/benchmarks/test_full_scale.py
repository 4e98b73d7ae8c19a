"""The benchmark at full scale, in miniature: its ways to hold the transformer compute one and the same training."""

import json
import math
import sys
from dataclasses import replace

import pytest
import torch

from benchmarks.full_scale import CAPS_GIB, H100_MATRIX_RATE, HEADER, Row, main
from benchmarks.full_scale_modes import MODES, OFFLINE, ONLINE, why_not
from benchmarks.full_scale_plan import Group, Place, estimated_seconds, plan
from benchmarks.random_teacher import SCALES

CPU, TINY = torch.device("cpu"), SCALES["tiny"]
# Of the gradient of the student's parameters. As tests/models/memory/test_quantized.py has them of the gradient towards
# the embedding, and a fifth more: these are other random weights. A student that is far off has losses as far off.
BOUNDS = {"int8": 1.2 * 0.02, "fp8": 1.2 * 0.08, "nf4": 1.2 * 0.25}
COLUMNS = HEADER.splitlines()[0].count("|")


def everything(scale: str) -> list[Group]:
    shapes = [shape.name for shape in SCALES[scale].shapes]
    return plan(scale, modes=list(MODES), shapes=shapes, caps=CAPS_GIB)


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    pytest.importorskip("torchao")
    pytest.importorskip("bitsandbytes")
    return main(["--scale", "tiny", "--steps", "3", "--device", "cpu"])


@pytest.mark.slow
def test_each_mode_is_run_and_timed(rows):
    planned = [(group.mode, place.batch_size) for group in everything("tiny") for place in group.places]
    assert [(row.mode, row.batch_size) for row in rows] == planned
    assert {mode for mode, _ in planned} == set(MODES)
    for row in rows:
        assert len(row.losses) == 3 and row.problem is None and all(map(math.isfinite, row.losses))
        assert row.step_ms > 0 and row.rate_part > 0 and row.wait_ms >= 0
        assert math.isnan(row.calculated_gib) == (row.mode == "fsdp2")
        # A GPU's figures are left out where there is none.
        assert math.isnan(row.peak_gib) and math.isnan(row.pinned_gib) and row.cap_gib is None


@pytest.mark.slow
def test_exact_modes_have_the_losses_and_the_gradient_of_the_online_loop(rows):
    exact = [row for row in rows if row.mode not in BOUNDS]
    online = {row.batch_size: row.losses for row in exact if row.mode == "online"}
    assert len(set(online[1])) == 3
    for row in exact:
        # Recorded with the largest batch: replayed with it there is not even rounding, nor is there of compiled blocks
        # that are traced and run as they are.
        bound = 0 if row.batch_size == max(TINY.batch_sizes) else 1e-5
        assert row.losses == pytest.approx(online[row.batch_size], rel=bound, abs=0), row.mode
        assert row.loss_difference <= bound and row.gradient_difference <= bound, row.mode


@pytest.mark.slow
def test_quantized_modes_are_off_by_no_more_than_stated_and_not_by_nothing(rows):
    quantized = [row for row in rows if row.mode in BOUNDS and row.student == TINY.student]
    assert len(quantized) == len(BOUNDS) * len(TINY.batch_sizes)
    for row in quantized:
        assert 0 < row.gradient_difference < BOUNDS[row.mode], row
        assert 0 < row.loss_difference < BOUNDS[row.mode], row


@pytest.mark.slow
def test_times_are_compared_with_the_online_loop_that_is_held_alike(rows):
    online = {(row.mode, row.batch_size): row.step_ms for row in rows if row.mode in ONLINE}
    for row in rows:
        if row.student == TINY.student:
            assert row.online_ratio == online[row.like, row.batch_size] / row.step_ms
        else:
            # Another student is another training.
            assert math.isnan(row.online_ratio) and math.isnan(row.loss_difference)
    for mode, held in OFFLINE.items():
        like = MODES[held.like].options
        recomputes = held.streams or held.options.activation_checkpointing > 0
        assert (like.activation_checkpointing > 0, like.compile) == (recomputes, held.options.compile), mode


@pytest.mark.slow
def test_the_table_comes_last_and_the_rows_can_be_had_as_json(tmp_path, capsys):
    rows = main(
        ["--scale", "tiny", "--modes", "table", "--steps", "3", "--device", "cpu", "--json", str(tmp_path / "rows")]
    )
    printed = capsys.readouterr().out.splitlines()
    table = [*HEADER.splitlines(), *(row.cells() for row in rows)]
    assert printed[-len(table) :] == table and printed[-len(table) - 2].startswith(
        f"CPU, torch {torch.__version__}, 20"
    )
    assert {line.count("|") for line in table} == {COLUMNS}
    written = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    assert [line["losses"] for line in written] == [list(row.losses) for row in rows]


def test_without_what_it_needs_a_mode_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    assert why_not(MODES["int8"], TINY, CPU) == (
        "not run: int8 weights need torchao, which is not installed: pip install 'secondcast[quant]'"
    )
    compiled, inductor = MODES["table+checkpointed+compiled"], replace(TINY, compiler="inductor")
    assert why_not(compiled, TINY, CPU) is None
    with torch._inductor.config.patch({"cpp.cxx": (None, "g-plus-plus")}):
        problem = why_not(compiled, inductor, CPU)
    assert problem is not None and problem.startswith("not run: --compile does not work on cpu (No working C++ compil")
    row = Row(
        mode="int8", student="t5-base", resolution=512, text_length=77, batch_size=1, cap_gib=15.0, resident=None,
        like="online", problem="not run: why",
    )  # fmt: skip
    assert row.cells().count("|") == COLUMNS


def test_the_plan_begins_with_online_and_its_like_and_every_row_has_one_to_be_compared_with():
    groups = everything("full")
    assert [group.mode for group in groups[:2]] == ["online", "plain"]
    assert {group.mode for group in groups} == set(MODES)
    assert {group.cap_gib for group in groups} == {None, *CAPS_GIB}
    done: set[tuple[str, Place]] = set()
    for group in groups:
        if group.mode in ONLINE:
            done |= {(group.mode, place) for place in group.places}
        if not group.small_student:
            assert {(MODES[group.mode].like, place) for place in group.places} <= done, group
    chosen = plan("full", modes=["table+checkpointed", "nf4"], shapes=["512-77"], caps=(23.0,))
    assert [(group.mode, len(group.places)) for group in chosen] == [("table+checkpointed", 2)]


@pytest.mark.slow
def test_the_whole_plan_is_calculated_to_fit_its_caps_and_nine_minutes_of_an_h100(capsys):
    rows = main(["--calculate"])
    assert all(row.calculated_gib <= row.cap_gib for row in rows if row.cap_gib is not None)
    # A streamed row that streams nothing would be another row's.
    assert all(row.resident < 57 for row in rows if row.resident is not None)
    seconds = estimated_seconds(SCALES["full"], everything("full"), steps=6, matrix_rate=H100_MATRIX_RATE)
    assert seconds < 9 * 60
    assert capsys.readouterr().out.splitlines()[2:] == [*HEADER.splitlines(), *(row.cells() for row in rows)]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps", "2"], "--steps is 2, expected more than 2: the first ones are not counted"),
        (["--shapes", "512-77", "own-24"], "--shapes has 512-77, expected some of own-24"),
    ],
)
def test_settings_that_measure_nothing_are_refused(flags, message, capsys):
    with pytest.raises(SystemExit):
        main(["--scale", "tiny", *flags])
    assert message in capsys.readouterr().err

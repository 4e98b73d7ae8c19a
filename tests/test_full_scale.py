"""The benchmark at full scale, in miniature: its ways to hold the transformer compute one and the same training."""

import json
import math

import pytest

from benchmarks.full_scale import HEADER, main
from benchmarks.full_scale_modes import OFFLINE, ONLINE
from benchmarks.random_teacher import SCALES


@pytest.mark.slow
def test_each_mode_has_the_losses_of_the_online_loop_to_rounding(tmp_path, capsys):
    rows = main(["--scale", "tiny", "--steps", "3", "--device", "cpu", "--json", str(tmp_path / "rows")])
    batch_sizes = SCALES["tiny"].batch_sizes
    assert [(row.mode, row.batch_size) for row in rows] == [
        (mode, size) for mode in (*ONLINE, *OFFLINE) for size in batch_sizes
    ]
    online = {row.batch_size: row.losses for row in rows if row.mode == "online"}
    for row in rows:
        assert len(row.losses) == 3 and row.problem is None
        assert row.losses == pytest.approx(online[row.batch_size], rel=1e-5), row.mode
        assert row.loss_difference < 1e-5 and row.step_ms > 0 and row.rate_part > 0 and row.online_ratio > 0
        # A GPU's figures are left out where there is none.
        assert math.isnan(row.peak_gib) and row.cap_gib is None
    # Recorded with the largest batch: replayed with it there is not even rounding.
    assert all(row.loss_difference == 0 for row in rows if row.batch_size == max(batch_sizes))
    assert len(set(online[1])) == 3
    written = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    assert [line["losses"] for line in written] == [list(row.losses) for row in rows]
    printed = capsys.readouterr().out.splitlines()
    table = [line for line in printed if line.startswith("|")]
    assert table == [*HEADER.splitlines(), *(row.cells() for row in rows)]
    assert {line.count("|") for line in table} == {13}


def test_steps_that_are_all_warm_up_are_refused(capsys):
    with pytest.raises(SystemExit):
        main(["--scale", "tiny", "--steps", "2"])
    assert "--steps is 2, expected more than 2: the first ones are not counted" in capsys.readouterr().err

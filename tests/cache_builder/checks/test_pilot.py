"""A pilot begins the real build: its shards stay, invariants 1 to 3 are checked on them, rates extrapolated."""

from pathlib import Path

import pytest
import torch

from secondcast import cli
from secondcast.cache_builder.checks.pilot import PilotResult, run_pilot
from secondcast.models.backbone import Backbone
from secondcast.models.teacher.folder import build_parts, find_teacher
from secondcast.storage_schemas.errors import NotInCacheError
from secondcast.storage_schemas.progress import Silent
from secondcast.storage_schemas.reader import Cache
from tests.cache_builder.building import build_cache, build_settings, data_files


def pilot(path: Path, teacher: Path, prompts: Path, count: int = 2, **flags) -> PilotResult:
    settings = build_settings(prompts, **flags)
    found = find_teacher(str(teacher), build_parts(settings.pooled))
    return run_pilot(path, settings, found, torch.device("cpu"), Silent(), count=count)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("teacher", "flags"),
    [
        ("dev_teacher", {"dtype": "float32", "height": 16, "width": 32, "pooled": "clip"}),
        ("schnell_teacher", {"format": "webdataset", "guidance": (3.5,)}),
    ],
    ids=["dev-like, fp32, not square, clip", "schnell-like, bf16, tars"],
)
def test_its_laws_hold_and_its_shards_are_the_builds(request, tmp_path, prompt_file, teacher, flags):
    folder = request.getfixturevalue(teacher)
    found = pilot(tmp_path / "c", folder, prompt_file, **flags)
    assert [(check.invariant, check.holds) for check in found.checks] == [
        (1, True),
        (2, True),
        (3, True),
    ] and found.holds
    assert found.checks[2].description.endswith("(8 of 8)")
    cache = Cache.open(tmp_path / "c")
    assert (len(cache), cache.planned, cache.finished) == (3, 6, False)
    assert (found.sample.rows, found.sample.planned_rows, found.text.rows) == (3, 6, 3)
    assert found.sample.total_bytes == 2 * found.sample.stored_bytes and found.sample.seconds_per_row > 0
    assert found.sample.total_seconds == pytest.approx(2 * found.sample.seconds) and found.peaks.keys() == {
        "text",
        "sample",
    }
    build_cache(tmp_path / "c", folder, prompt_file, **flags)
    build_cache(tmp_path / "whole", folder, prompt_file, **flags)
    assert data_files(tmp_path / "c") == data_files(tmp_path / "whole")


def test_a_device_that_computes_otherwise_is_found_out(tmp_path, dev_teacher, prompt_file, monkeypatch):
    predict = Backbone.predict
    with monkeypatch.context() as patched:
        patched.setattr(Backbone, "predict", lambda *inputs, **more: predict(*inputs, **more) * 1.0009765625)
        found = pilot(tmp_path / "c", dev_teacher, prompt_file, dtype="float32")
        # The pipeline calls the transformer itself: it sees what is right.
        assert [check.holds for check in found.checks] == [False, True, True] and not found.holds
        assert "violated: final latents are FluxPipeline's, bit for bit only in 0 of 1" in found.checks[0].description
    again = pilot(tmp_path / "c", dev_teacher, prompt_file, dtype="float32")
    assert [check.holds for check in again.checks] == [False, True, False] and again.peaks == {}
    assert "in 0 of 8; largest relative error 9.8e-04" in again.checks[2].description


def test_what_cannot_be_checked_says_why(tmp_path, dev_teacher, prompt_file):
    found = pilot(tmp_path / "c", dev_teacher, prompt_file, schedule="distillt5", latents="stored", compression="int8")
    assert [check.description for check in found.checks] == [
        "not checked: FluxPipeline has no schedule 'distillt5'",
        "not checked: latents are stored",
        "not checked: compression int8 rounds the velocity",
    ]
    assert found.holds


def test_a_pilot_of_more_than_there_is_is_the_whole_build(tmp_path, dev_teacher, prompt_file):
    assert pilot(tmp_path / "c", dev_teacher, prompt_file, count=100).sample.rows == 6
    assert Cache.open(tmp_path / "c").finished


def test_a_pilot_may_end_a_build_that_keeps_no_embeddings_but_not_follow_it(tmp_path, dev_teacher, prompt_file):
    found = pilot(tmp_path / "c", dev_teacher, prompt_file, count=100, store_embeddings=False)
    assert found.holds and (found.text.rows, found.text.planned_rows) == (6, 6) and found.text.stored_bytes > 0
    cache = Cache.open(tmp_path / "c")
    assert cache.finished and cache.records.rows("embeddings") == 0
    with pytest.raises(NotInCacheError) as caught:
        pilot(tmp_path / "c", dev_teacher, prompt_file, store_embeddings=False)
    assert str(caught.value) == (
        f"{tmp_path}/c already has its first trajectories and does not store embeddings (--no-store-embeddings): a "
        f"pilot "
        f"cannot check them; use `secondcast inspect verify {tmp_path}/c --resample N`"
    )


def test_embeddings_that_are_not_kept_do_not_count(tmp_path, dev_teacher, prompt_file):
    found = pilot(tmp_path / "c", dev_teacher, prompt_file, store_embeddings=False)
    assert found.total_bytes == found.sample.total_bytes and found.text.total_bytes > 0


@pytest.mark.parametrize("flags", [["--stage", "text"], ["--workers", "2"], ["--worker", "0/2"], ["--ray", "local"]])
def test_a_pilot_is_for_one_process(tmp_path, dev_teacher, prompt_file, monkeypatch, capsys, flags):
    command = ["build", str(tmp_path / "c"), "--teacher", str(dev_teacher), "--prompts", str(prompt_file)]
    monkeypatch.setattr("sys.argv", ["secondcast", *command, "--pilot", "2", *flags])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 1
    assert capsys.readouterr().err.strip() == (
        "secondcast: --pilot measures one process that runs both stages: remove --stage, --workers, --worker and "
        "--ray (and run it without torchrun and srun)"
    )


def test_the_command_prints_what_it_found(tmp_path, dev_teacher, prompt_file, monkeypatch, capsys):
    command = ["build", str(tmp_path / "c"), "--teacher", str(dev_teacher), "--prompts", str(prompt_file)]
    monkeypatch.setattr("sys.argv", ["secondcast", *command, "--pilot", "2", "--steps", "3", "--shard-size", "3", "-q"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    printed = capsys.readouterr().out
    assert caught.value.code == 0 and "3 of 6" in printed
    assert "invariant 1 holds: final latents are FluxPipeline's, bit for bit (" in printed
    assert f"{tmp_path}/c: the whole build takes about" in printed and "to resume from here" in printed

"""Statistics are the same for any batches, and an interrupted collection resumes to the same bytes."""

import json

import pytest
import torch

from secondcast.models.student.initial.statistics import CHUNK_PROMPTS, Pairs, Sums, chunks_of, collect, read_sums
from secondcast.models.student.initial.work_folder import WorkFolder
from secondcast.storage_schemas.errors import SettingsError, SettingsMismatchError, StudentError
from secondcast.storage_schemas.progress import Silent
from tests.models.student.initial.making import SETTINGS, make_in, pocket_encoder, pocket_ids

IDS = pocket_ids(150, 20)


def collected(work: WorkFolder, batch_size: int, load=None) -> Sums:
    all_NT = torch.cat([IDS.fitted_NT, IDS.held_NT])
    return collect(
        load or pocket_encoder().load, all_NT, 150, work,
        config=pocket_encoder().weights.config, batch_size=batch_size, progress=Silent(),
    )  # fmt: skip


@pytest.mark.thorough
def test_sums_and_embeddings_do_not_depend_on_batches_beyond_rounding(tmp_path):
    one, other = WorkFolder(tmp_path / "a"), WorkFolder(tmp_path / "b")
    first, second = collected(one, 7), collected(other, 64)
    for name in vars(first):
        found, wanted = getattr(first, name), getattr(second, name)
        # fp32 within a batch: 2^-24 per term, far less than this in the mean over terms.
        assert float((found - wanted).abs().max()) < 1e-5 * float(wanted.abs().max()), name
        assert found.dtype == torch.float64 and float(found.abs().max()) > 0
    # Nine reads in four layers, at a mean square of 1, of the fitted prompts alone.
    tokens = 150 * 24
    assert float(first.moment_DD.trace()) == pytest.approx(9 * tokens * 256, rel=1e-5)


@pytest.mark.thorough
def test_sums_are_those_of_all_hidden_states_at_once(tmp_path):
    found = collected(WorkFolder(tmp_path / "a"), 16)
    seen = []
    wo = pocket_encoder().load().encoder.block[2].layer[-1].DenseReluDense.wo
    hook = wo.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        pocket_encoder().load()(input_ids=IDS.fitted_NT)
    hook.remove()
    torch.testing.assert_close(found.units_LF[2], seen[0].double().square().sum((0, 1)), rtol=1e-4, atol=0)


class Stopping(Silent):
    """Raises as Ctrl-C does, behind a number of prompts."""

    def __init__(self, prompts: int) -> None:
        self._left = prompts

    def advance(self, count: int, note: str = "") -> None:
        self._left -= count
        if self._left < 0:
            raise KeyboardInterrupt


@pytest.mark.thorough
def test_an_interrupted_call_resumes_and_ends_with_the_same_bytes(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        make_in(tmp_path / "broken", IDS, Stopping(140))
    work = WorkFolder(tmp_path / "broken")
    assert not (tmp_path / "broken").exists()
    assert read_sums(work, pocket_encoder().weights.config)[1] == 2 * CHUNK_PROMPTS
    kept = work.path / "embeddings-000000.safetensors"
    written = kept.stat().st_mtime_ns
    # Interrupted again, behind the statistics.
    with pytest.raises(KeyboardInterrupt):
        make_in(tmp_path / "broken", IDS, Stopping(43))
    assert kept.stat().st_mtime_ns == written
    assert read_sums(work, pocket_encoder().weights.config)[1] == 170

    def not_again():
        raise AssertionError

    assert torch.equal(collected(work, 16, not_again).units_LF, collected(WorkFolder(tmp_path / "c"), 16).units_LF)
    assert make_in(tmp_path / "broken", IDS) == make_in(tmp_path / "whole", IDS)
    assert not work.path.exists() and not WorkFolder(tmp_path / "whole").path.exists()


def test_statistics_of_other_settings_are_not_used(tmp_path):
    work = WorkFolder(tmp_path / "out")
    with work.opened(SETTINGS):
        pass
    with (
        pytest.raises(
            SettingsMismatchError,
            match=r"\.out\.init-student has statistics of an interrupted call with teacher = pocket, not flux: give",
        ),
        work.opened({"teacher": "flux"}),
    ):
        pass


@pytest.mark.thorough
def test_statistics_that_were_damaged_are_reported_in_one_line(tmp_path):
    work = WorkFolder(tmp_path / "out")
    collected(work, 64)
    (work.path / "embeddings-000064.safetensors").unlink()
    pairs = Pairs(work=work, token_ids_NT=IDS.fitted_NT, chunks=chunks_of(0, 150), width=256, batch_size=16)
    with pytest.raises(
        StudentError, match=r"\.out\.init-student has no embeddings-000064\.safetensors any more: delete"
    ):
        list(pairs)
    (work.path / "sums.safetensors").write_bytes(b"\x00" * 9)
    with pytest.raises(StudentError, match=r"cannot be loaded: sums\.safetensors is not a whole safetensors file"):
        collected(work, 64)


def test_files_of_a_user_in_the_place_of_statistics_are_kept(tmp_path):
    work = WorkFolder(tmp_path / "out")
    work.path.mkdir()
    (work.path / "thesis.txt").write_text("mine")
    with (
        pytest.raises(SettingsError, match=r"\.out\.init-student has files that this command did not write: move it"),
        work.opened(SETTINGS),
    ):
        pass
    assert [file.name for file in work.path.iterdir()] == ["thesis.txt"]


def test_a_folder_with_another_student_is_refused(tmp_path):
    out = tmp_path / "out"
    work = WorkFolder(out)
    assert work.check_out({"size": "small"}) is False
    out.mkdir()
    assert work.check_out({"size": "small"}) is False
    (out / "config.json").write_text("{}")
    with pytest.raises(SettingsError, match="out exists and is not empty, but has no initial.json of this command"):
        work.check_out({"size": "small"})
    (out / "initial.json").write_text(json.dumps({"asked": {"size": "small"}}))
    assert work.check_out({"size": "small"}) is True
    with pytest.raises(SettingsMismatchError, match="out is an initial student made with size = small, not base: give"):
        work.check_out({"size": "base"})

"""The data of a report: numbers of the records, a choice that is told, and what is damaged left out and named."""

import base64
import io
import json
import shutil
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image

from secondcast.evaluation.on_cache import evaluate_on_cache
from secondcast.evaluation.pictures import distances
from secondcast.evaluation.replaying import CacheStudent
from secondcast.evaluation.settings.cache_scoring import CacheScoring
from secondcast.inspection.images import shown_steps
from secondcast.inspection.report import report
from secondcast.inspection.report.curves import run_curves
from secondcast.inspection.report.page import render
from secondcast.inspection.report.report import ReportSettings, report_data
from secondcast.inspection.report.strips import check_sheet, chosen_rows, data_uri
from secondcast.inspection.report.table import UNREADABLE, evenly, finite_rms
from secondcast.models.student.student import load_student
from secondcast.models.teacher.folder import DECODE_PARTS, find_teacher
from secondcast.models.teacher.image_decoder import load_recorded_decoder
from secondcast.storage_schemas.errors import NotACacheError, SettingsError, TeacherError
from secondcast.storage_schemas.progress import Silent, counted
from secondcast.storage_schemas.reader import Cache
from tests.cache_builder.building import build_cache
from tests.evaluation.conftest import recorded, student, t5_config
from tests.evaluation.recorded import CPU, ROWS, STEPS, make_student, replayed
from tests.inspection.report.report_data import report_data as made_up_data
from tests.models.families.random_teacher import make_teacher
from tests.storage_schemas.caches import begin, commit, write_cache

__all__ = ["recorded", "student", "t5_config"]

NORMS = ("velocity_rms", "final_rms", "non_finite")
SHARDS = {"zarr": "trajectories.zarr/velocity/c/0/0/0/0", "webdataset": "trajectories/000000.tar"}


def data_of(location, **flags):
    found = report_data(
        str(location), ReportSettings.from_flags(**flags), resolve=find_teacher, device=CPU, progress=Silent()
    )
    # Plain JSON types, and numbers only: what the page is given.
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    return found


def picture_of(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/webp;base64,"))))


def said(found) -> str:
    return "\n".join(found["notes"])


@pytest.mark.parametrize("form", ["zarr", "webdataset"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_committed_trajectory_has_a_row_with_the_numbers_of_its_record(tmp_path, form, dtype):
    write_cache(tmp_path / "c", format=form, dtype=dtype)
    cache, found = Cache.open(tmp_path / "c"), data_of(tmp_path / "c")
    table = found["trajectories"]
    assert table["index"] == list(range(6)) and table["source_names"] == ["made-up"] and table["sources"] == [[0]] * 6
    assert table["tokens"] == [3] * 6 and table["sample_index"] == [0] * 6
    for row in range(6):
        trajectory = cache.trajectory(row)
        assert (table["key"][row], table["prompt"][row]) == (trajectory.key, f"prompt number {row}")
        velocity = trajectory.velocity_KSC.astype(np.float64)
        assert table["velocity_rms"][row] == pytest.approx(np.sqrt((velocity**2).mean()), rel=5e-4)
        final = trajectory.final_latent_SC.astype(np.float64)
        assert table["final_rms"][row] == pytest.approx(np.sqrt((final**2).mean()), rel=5e-4)
    assert table["non_finite"] == [0] * 6
    assert found["integrity"]["state"] == "intact" and found["integrity"]["problems"] == []
    assert found["title"] == "c" and found["schedule"] == {"sigmas": [1, 0.75, 0.4, 0], "timesteps": [1, 0.75, 0.4]}
    assert [name for name, _ in found["summary"]][:2] == ["cache", "teacher"]


@pytest.mark.thorough
def test_the_page_is_given_what_the_tests_of_the_page_make_up(recorded, student, dev_teacher):
    found = data_of(
        recorded, students=[student], num_trajectories=0, teacher=str(dev_teacher), num_strips=1, num_frames=1
    )
    made_up = made_up_data()
    assert found.keys() == made_up.keys() and found["cache"] == str(recorded)
    for part in ("trajectories", "strips", "integrity", "schedule"):
        assert found[part].keys() == made_up[part].keys()
    assert found["students"][0].keys() == made_up["students"][0].keys()
    assert found["strips"]["rows"][0].keys() == made_up["strips"]["rows"][0].keys()


def test_guidance_is_that_of_the_recording_without_reading_it(recorded):
    cache, found = Cache.open(recorded), data_of(recorded, max_norms=0, num_strips=0)
    assert found["trajectories"]["guidance"] == [cache.guidance(index) for index in range(12)]
    assert found["trajectories"]["velocity_rms"] == [None] * 12
    assert "norms of 0 of 12 trajectories; for all of them use `secondcast inspect report --max-norms 12`" in said(
        found
    )


def test_values_that_are_not_finite_are_counted_and_left_out_of_the_norms():
    assert finite_rms(np.array([[3.0, np.nan], [-np.inf, 4.0]], dtype=np.float32)) == (pytest.approx(12.5**0.5), 2)
    assert finite_rms(np.full(3, np.nan, dtype=np.float32)) == (None, 3)


@pytest.mark.thorough
def test_norms_of_a_few_are_spread_evenly_and_said(tmp_path):
    write_cache(tmp_path / "c", count=30)
    found = data_of(tmp_path / "c", max_norms=10, num_strips=0)
    read = [row for row, value in enumerate(found["trajectories"]["velocity_rms"]) if value is not None]
    assert read == [1, 4, 7, 10, 13, 16, 19, 22, 25, 28] == evenly(30, 10)
    assert (
        "norms of 10 of 30 trajectories, spread evenly; for all of them use `secondcast inspect report --max-norms 30`"
        in found["notes"]
    )


def test_a_record_that_the_index_repeats_is_mended_without_the_teacher(tmp_path):
    write_cache(tmp_path / "c")
    (tmp_path / "c/commits/trajectories-000001.json").write_bytes(b"{}")
    (problem,) = data_of(tmp_path / "c", max_norms=0)["integrity"]["problems"]
    assert problem["repair"] == f"secondcast repair {tmp_path}/c"


@pytest.mark.parametrize("form", ["zarr", "webdataset"])
def test_a_damaged_shard_is_left_out_and_told_with_the_command_that_mends_it(tmp_path, form):
    write_cache(tmp_path / "c", format=form)
    file = tmp_path / "c" / SHARDS[form]
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)
    found = data_of(tmp_path / "c")
    table = found["trajectories"]
    assert [table[name][:4] for name in NORMS] == [[None] * 4] * 3 and None not in table["velocity_rms"][4:]
    assert table["prompt"][0] == "prompt number 0"
    assert found["integrity"]["state"] == "damaged" and found["integrity"]["text"].endswith(": 1 problem")
    (problem,) = found["integrity"]["problems"]
    assert problem["path"] == SHARDS[form] and "has checksum" in problem["problem"]
    assert problem["repair"] == f"secondcast repair {tmp_path}/c --teacher made-up"
    assert "4 of the 6 trajectories chosen for norms are in damaged shards" in found["notes"]


def test_a_shard_that_is_gone_is_found_without_checking_as_well(tmp_path):
    write_cache(tmp_path / "c")
    (tmp_path / "c" / SHARDS["zarr"]).unlink()
    found = data_of(tmp_path / "c", verify_checksums=False)
    assert found["integrity"] == {
        "state": "not checked", "text": "checksums were not compared: --no-verify-checksums", "problems": []
    }  # fmt: skip
    assert found["trajectories"]["velocity_rms"][:4] == [None] * 4


def test_a_prompt_that_was_changed_is_named_and_the_others_are_shown(tmp_path):
    write_cache(tmp_path / "c")
    file = tmp_path / "c/prompts.jsonl"
    file.write_bytes(file.read_bytes().replace(b"prompt number 2", b"prompt nunber 2"))
    found = data_of(tmp_path / "c")
    assert found["trajectories"]["prompt"][1:4] == ["prompt number 1", UNREADABLE, "prompt number 3"]
    assert "1 of 6 prompts cannot be read: see the problems" in found["notes"]
    (problem,) = found["integrity"]["problems"]
    assert (problem["path"], problem["repair"]) == ("prompts.jsonl", f"secondcast repair {tmp_path}/c --from COPY")


@pytest.mark.parametrize("name", ["trajectories.zarr/velocity/zarr.json", "prompts.offsets", "commits/index.json"])
def test_a_cache_that_cannot_be_opened_still_gives_a_report_of_its_files(tmp_path, name):
    write_cache(tmp_path / "c")
    (tmp_path / "c" / name).write_bytes(b"{}")
    found = data_of(tmp_path / "c", students=[tmp_path / "not-looked-at"])
    assert found["integrity"]["state"] == "damaged"
    assert {problem["path"]: problem["repair"] for problem in found["integrity"]["problems"]}[name] == (
        f"secondcast repair {tmp_path}/c"
    )
    assert "the cache cannot be read: " in said(found) and "table, film strips and students are omitted" in said(found)
    assert found["trajectories"]["index"] == [] and "cannot be read" in found["summary"][0][1]
    render(found)


def test_what_is_no_file_of_the_cache_is_deleted_and_a_folder_that_is_no_cache_refused(tmp_path):
    write_cache(tmp_path / "c")
    (tmp_path / "c/some note.txt").write_text("mine")
    (problem,) = data_of(tmp_path / "c")["integrity"]["problems"]
    assert problem["repair"] == f"rm '{tmp_path}/c/some note.txt'"
    with pytest.raises(NotACacheError, match=r"has no manifest.json: it is not a cache"):
        data_of(tmp_path)


def test_a_cache_being_built_shows_what_is_there_and_says_so(tmp_path):
    writer = begin(tmp_path / "c")
    commit(writer, writer.missing("trajectories")[1])
    found = data_of(tmp_path / "c")
    assert found["trajectories"]["index"] == [4, 5]
    assert "the cache is being built: 2 of its 6 trajectories are committed" in found["notes"]
    assert (
        found["integrity"]["text"].startswith("1 shard, ")
        and ", 3 not built yet: every" in (found["integrity"]["text"])
    )


def test_a_cache_of_nothing_yet_gives_an_empty_table(tmp_path):
    begin(tmp_path / "c")
    found = data_of(tmp_path / "c")
    assert found["trajectories"]["index"] == [] and found["strips"]["rows"] == []
    render(found)


@pytest.mark.thorough
def test_a_cache_on_an_object_store_is_read_as_one_on_disk(tmp_path, s3):
    for place in (f"{s3.url}/c", tmp_path / "c"):
        write_cache(place)
    there, here = data_of(f"{s3.url}/c"), data_of(tmp_path / "c")
    assert there["trajectories"] == here["trajectories"] and there["integrity"] == here["integrity"]


def test_without_the_vae_there_are_no_strips_and_a_note_says_the_way_out(tmp_path):
    write_cache(tmp_path / "c")
    found = data_of(tmp_path / "c")
    assert found["strips"] == {"frame_px": 8, "steps": [0, 1, 2], "rows": []}
    assert said(found).startswith("no film strips: ") and "report --teacher FOLDER`" in said(found)
    with pytest.raises(TeacherError, match="no-such-teacher"):
        data_of(tmp_path / "c", teacher=str(tmp_path / "no-such-teacher"))


def test_a_strip_shows_the_decoded_latents_above_and_the_clean_ones_below(recorded, dev_teacher):
    found = data_of(recorded, teacher=str(dev_teacher), num_strips=4, num_frames=2)
    strips = found["strips"]
    assert strips["steps"] == [0, 2] and strips["frame_px"] == 16
    assert [one["why"] for one in strips["rows"]] == ["random"] * 4
    assert (
        "film strips of 4 of 12 trajectories: the 0 hardest and 4 at random (seed 0); for all of them use `secondcast "
        "inspect report --num-strips all`"
    ) in found["notes"]
    cache = Cache.open(recorded)
    decoder = load_recorded_decoder(find_teacher(str(dev_teacher), DECODE_PARTS), cache.manifest.sampling, CPU)
    import torch

    for one in strips["rows"]:
        sheet = np.asarray(picture_of(one["sheet"]))
        assert sheet.shape == (32, 48, 3)
        trajectory = cache.trajectory(one["row"])
        wanted = decoder.decode(torch.from_numpy(np.stack([trajectory.noise_SC, trajectory.final_latent_SC])))
        # In 32 levels of each colour.
        assert np.abs(sheet[:16, :16].astype(int) - wanted[0]).max() <= 5
        assert np.abs(sheet[:16, 32:].astype(int) - wanted[1]).max() <= 5
        assert (sheet[:16, 32:] == sheet[16:, 32:]).all() and not (sheet[:16, :16] == sheet[16:, :16]).all()


@pytest.mark.thorough
def test_all_strips_are_shown_where_all_are_asked_for_or_there_are_no_more(recorded, dev_teacher):
    for strips in (None, 12):
        rows = data_of(recorded, teacher=str(dev_teacher), num_strips=strips, num_frames=1, max_norms=0)["strips"][
            "rows"
        ]
        assert [(one["row"], one["why"]) for one in rows] == [(row, "all") for row in range(12)]


def test_half_of_the_strips_are_the_harder_half_of_what_was_evaluated():
    chosen = chosen_rows(100, 8, {row: float(row) for row in range(20)}, seed=0)
    assert [row for row, why in chosen if why == "hardest"] == [16, 17, 18, 19]
    assert len(chosen) == len({row for row, _ in chosen}) == 8
    assert chosen == chosen_rows(100, 8, {row: float(row) for row in range(20)}, seed=0)
    assert chosen != chosen_rows(100, 8, {row: float(row) for row in range(20)}, seed=1)
    assert [row for row, why in chosen_rows(100, 8, {7: 0.1, 8: 0.2}, seed=0) if why == "hardest"] == [8]
    assert shown_steps(20, 8) == [0, 3, 5, 8, 11, 14, 16, 19] and shown_steps(3, 9) == [0, 1, 2]


def test_a_vae_of_another_teacher_and_a_sheet_too_wide_are_refused(recorded, tmp_path):
    other = make_teacher(tmp_path / "t", seed=2, in_channels=32)
    with pytest.raises(TeacherError, match=r"16 tokens of 32 channels into 16 x 16 pixels, but the cache has 16 of 16"):
        data_of(recorded, teacher=str(other))
    sampling = Cache.open(recorded).manifest.sampling.model_copy(update={"height": 1024, "width": 512, "steps": 50})
    with pytest.raises(SettingsError, match=r"51 frames of 512 pixels are 26112 pixels wide, WebP allows 16383: give "
                                          r"--frame-size 321, or --num-frames 30"):  # fmt: skip
        check_sheet(sampling, side=512, frames=None)
    check_sheet(sampling, side=321, frames=None)
    check_sheet(sampling, side=512, frames=30)


def test_photographs_are_lossy_and_small_frames_are_not():
    values = np.random.default_rng(0).integers(0, 256, (96, 192, 3), dtype=np.uint8)
    small = np.asarray(picture_of(data_uri(Image.fromarray(values), frame_side=48)))
    assert np.abs(small.astype(int) - values).max() <= 5
    large = np.asarray(picture_of(data_uri(Image.fromarray(values), frame_side=96)))
    assert np.abs(large.astype(int) - values).max() > 50


@pytest.mark.thorough
def test_a_row_of_the_table_costs_less_than_180_bytes(tmp_path):
    """With 5,000 rows less than 1 MB; 64 strips of 90 KB in base64 are 8 MB."""
    sizes = []
    for count in (8, 40):
        write_cache(tmp_path / str(count), count=count, shard_size=64)
        sizes.append(len(render(data_of(tmp_path / str(count), num_strips=0)).encode()))
    assert 0 < (sizes[1] - sizes[0]) / 32 < 180


def test_curves_are_those_of_the_run_and_thinned_out(tmp_path):
    lines = [{"step": 0, "replay_error": 0.1}]
    lines += [{"step": k, "loss": float(k), "kind": "embedding", "learning_rate": 1e-3} for k in range(1000)]
    lines += [{"step": 999, "validation_loss": 0.5}, {"step": 1000, "loss": float("nan"), "kind": "embedding"}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 10')
    curves = {curve["name"]: curve for curve in run_curves(tmp_path)}
    assert list(curves) == ["loss", "validation loss", "learning rate"]
    loss = curves["loss"]
    assert len(loss["x"]) == len(loss["y"]) == 400 and loss["x"][-1] == 999 and loss["y"][0] == 1.0
    assert curves["validation loss"] == {"name": "validation loss", "x": [999], "y": [0.5]}
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write("\n" + json.dumps({"step": 1001, "loss": 2.0, "kind": "vision"}) + "\n")
        # During a warm-up too: it is measured by replay wherever there is the transformer.
        file.write(json.dumps({"step": 1002, "validation_loss": 1.0, "validation_loss_by_step": {"0": 1.0}}) + "\n")
    assert [curve["name"] for curve in run_curves(tmp_path)] == [
        "embedding loss", "vision loss", "validation loss", "validation vision loss", "learning rate"
    ]  # fmt: skip
    assert run_curves(tmp_path / "no run") == []


@pytest.mark.thorough
def test_students_are_evaluated_on_one_backbone_with_pictures_of_where_they_lead(recorded, student, dev_teacher):
    pytest.importorskip("skimage")
    flags = {"teacher": str(dev_teacher), "batch_size": ROWS, "closed_loop": 2, "num_strips": 4, "num_frames": 1}
    found = data_of(recorded, students=[student, student], num_trajectories=5, **flags)
    first, second = found["students"]
    assert (first["name"], second["name"]) == (str(student), f"{student} (2)")
    assert {**first, "name": ""} == {**second, "name": ""}
    scoring = CacheScoring(num_trajectories=5, closed_loop=2, batch_size=ROWS)
    wanted = evaluate_on_cache(
        student, Cache.open(recorded), replayed(dev_teacher), scoring, device=CPU, progress=Silent()
    )  # fmt: skip
    keys = found["trajectories"]["key"]
    assert [keys[row] for row in first["rows"]] == [one.key for one in wanted.trajectories]
    assert np.array(first["errors"]) == pytest.approx(np.array(wanted.errors.error_fraction), rel=1e-3)
    assert np.array(first["replay_error"]).max() == 0 and first["steps"] == list(range(STEPS))
    led = wanted.closed_loop.text_encoders["student"]
    assert first["closed"]["latent_fraction"] == pytest.approx(led.latent_fraction, rel=1e-3)
    assert [keys[row] for row in first["closed"]["rows"]] == [
        wanted.trajectories[place].key for place in wanted.closed_loop.trajectories
    ]
    assert [picture_of(uri).size for uri in first["closed"]["final"]] == [(16, 16)] * 2
    means = {row: np.mean(errors) for row, errors in zip(first["rows"], first["errors"], strict=True)}
    hardest = {one["row"] for one in found["strips"]["rows"] if one["why"] == "hardest"}
    assert hardest == set(sorted(means, key=lambda row: -means[row])[:2])
    assert "students on 5 of 8 held-out trajectories, spread over the sources" in found["notes"]


@pytest.mark.thorough
def test_teacher_and_untrained_student_are_pictured_on_what_students_were_sampled_on(
    recorded, student, dev_teacher, monkeypatch
):
    pytest.importorskip("skimage")
    flags = {"teacher": str(dev_teacher), "batch_size": ROWS, "num_strips": 0, "num_trajectories": 5}
    found = data_of(recorded, students=[student], closed_loop=2, random_baseline=True, **flags)
    closed, pictures = found["students"][0]["closed"], found["pictures"]
    assert pictures["rows"] == closed["rows"] and [len(pictures[name]) for name in ("teacher", "untrained")] == [2, 2]
    cache = Cache.open(recorded)
    decoder = load_recorded_decoder(find_teacher(str(dev_teacher), DECODE_PARTS), cache.manifest.sampling, CPU)
    index = found["trajectories"]["index"][pictures["rows"][1]]
    final_BSC = torch.from_numpy(cache.trajectory(index).final_latent_SC.astype(np.float32))[None]
    teacher = Image.fromarray(decoder.decode(final_BSC)[0])
    assert pictures["teacher"][1] == data_uri(teacher, frame_side=16)
    # A tiny random transformer gives all students the same rounded images: these get an embedding of their own.
    monkeypatch.setattr(CacheStudent, "untrained", lambda self, *, seed: Loud(self, 50 + seed))
    loud, other = (
        data_of(recorded, students=[student], closed_loop=2, random_baseline=True, seed=seed, **flags)
        for seed in (0, 1)
    )
    assert loud["students"][0]["closed"] == closed and loud["pictures"]["teacher"] == pictures["teacher"]
    drawn = [one["pictures"]["untrained"] for one in (loud, other)]
    assert len({*closed["final"], *drawn[0], *drawn[1]}) > len(set(closed["final"])) + 1
    assert data_of(recorded, students=[student], closed_loop=2, **flags)["pictures"] == pictures | {"untrained": []}


@dataclass(frozen=True)
class Loud:
    """A student whose embeddings are those of another, many times as large."""

    student: CacheStudent
    factor: int

    def embeddings(self, prompts):
        return self.student.embeddings(prompts).flip(-1) * self.factor


@pytest.mark.thorough
def test_without_scikit_image_there_are_pictures_and_no_psnr(recorded, student, dev_teacher, monkeypatch):
    monkeypatch.setattr(distances, "find_spec", lambda name: None)
    flags = {"teacher": str(dev_teacher), "batch_size": ROWS, "num_strips": 0, "num_trajectories": 5}
    found = data_of(recorded, students=[student], closed_loop=2, **flags)
    closed = found["students"][0]["closed"]
    assert closed["psnr_db"] == [] and closed["ssim"] == []
    assert len(closed["latent_fraction"]) == len(closed["final"]) == len(found["pictures"]["teacher"]) == 2
    assert "closed loop without PSNR and SSIM, which need scikit-image: pip install 'secondcast[metrics]'" in said(
        found
    )


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({}, "0 --student, --num-trajectories 64 and --closed-loop 16"),
        ({"students": ["s"], "closed_loop": 0}, "1 --student, --num-trajectories 64 and --closed-loop 0"),
        ({"students": ["s"], "num_trajectories": 0}, "1 --student, --num-trajectories 0 and --closed-loop 16"),
    ],
)
def test_an_untrained_student_is_refused_where_none_is_sampled(flags, named):
    with pytest.raises(SettingsError, match=f"--random-baseline has no effect with {named}: remove it"):
        ReportSettings.from_flags(random_baseline=True, **flags)


def test_a_student_may_be_called_as_the_recording_is(recorded, student, dev_teacher, tmp_path):
    pytest.importorskip("skimage")
    shutil.copytree(student, tmp_path / "recorded")
    flags = {
        "num_trajectories": 1,
        "closed_loop": 1,
        "num_strips": 0,
        "max_norms": 0,
        "batch_size": ROWS,
        "teacher": str(dev_teacher),
    }
    (one,) = data_of(recorded, students=[tmp_path / "recorded"], **flags)["students"]
    assert one["name"] == "recorded" and len(one["closed"]["final"]) == 1


def test_what_does_not_fit_is_refused_before_files_are_read(recorded, student, tmp_path, monkeypatch):
    def read(*given):
        raise AssertionError("files were compared with their checksums")

    monkeypatch.setattr(report, "check_files", read)
    other = make_teacher(tmp_path / "t", seed=2)
    with pytest.raises(TeacherError, match=r"another model: give the recorded one with --backbone"):
        data_of(recorded, students=[student], teacher=str(other))


def test_a_recorded_evaluation_is_taken_as_it_is(recorded, student, dev_teacher, tmp_path):
    scoring = CacheScoring(num_trajectories=5, closed_loop=0, batch_size=ROWS, timesteps=(0, 2))
    evaluation = evaluate_on_cache(
        student, Cache.open(recorded), replayed(dev_teacher), scoring, device=CPU, progress=Silent()
    )  # fmt: skip
    evaluation.write(tmp_path / "e.json")
    found = data_of(recorded, evaluations=[tmp_path / "e.json"], num_strips=0)
    (one,) = found["students"]
    assert one["name"] == "s" and one["steps"] == [0, 2] and one["closed"] is None
    assert one["parameters"] == sum(p.numel() for p in load_student(student).parameters())
    assert np.array(one["errors"]) == pytest.approx(np.array(evaluation.errors.error_fraction), rel=1e-3)
    evaluation.model_copy(update={"sampling_digest": "0" * 32, "cache": "elsewhere"}).write(tmp_path / "o.json")
    own = Cache.open(recorded).manifest.digests()["sampling"][:12]
    with pytest.raises(SettingsError, match=rf"o.json was evaluated on a cache with sampling 0{{12}} \(elsewhere\), "
                                          rf".* has {own}: it was evaluated on other trajectories"):  # fmt: skip
        data_of(recorded, evaluations=[tmp_path / "o.json"])
    others = tuple(one.model_copy(update={"key": f"other-{one.key}"}) for one in evaluation.trajectories)
    evaluation.model_copy(update={"trajectories": others}).write(tmp_path / "p.json")
    with pytest.raises(SettingsError, match="has 5 trajectories of .*, none of which is in this cache"):
        data_of(recorded, evaluations=[tmp_path / "p.json"], num_strips=0)


def test_damaged_held_out_trajectories_and_embeddings_are_left_out_of_an_evaluation(
    recorded, student, dev_teacher, tmp_path
):
    shutil.copytree(recorded, tmp_path / "c")
    for kind in ("trajectories.zarr/velocity/c/0/0/0/0", "embeddings.zarr/encoder_hidden_states/c/2/0/0"):
        (tmp_path / "c" / kind).write_bytes(b"")
    flags = {"teacher": str(dev_teacher), "batch_size": ROWS, "closed_loop": 0, "num_strips": 0}
    found = data_of(tmp_path / "c", students=[student], **flags)
    (one,) = found["students"]
    assert 0 < len(one["rows"]) < 8 and all(row >= ROWS for row in one["rows"]) and one["replay_error"] is None
    left_out = f"skipped {counted(8 - len(one['rows']), 'held-out trajectory')}: damaged, not finite, or"
    assert f"{left_out} without the pooled vector" in found["notes"]
    assert "no replay error: the cache lacks the teacher's embeddings of some prompts" in found["notes"]


def test_a_schnell_like_cache_without_embeddings_and_held_out_prompts_gives_a_report(
    tmp_path, schnell_teacher, t5_config
):
    (tmp_path / "p.txt").write_text("a red dog\ntwo cats\n")
    build_cache(
        tmp_path / "c", schnell_teacher, tmp_path / "p.txt", store_embeddings=False, format="webdataset"
    )  # fmt: skip
    student = make_student(tmp_path / "s", t5_config, tmp_path / "c")
    found = data_of(tmp_path / "c", students=[student])
    assert found["trajectories"]["guidance"] == [None, None]
    assert [one["why"] for one in found["strips"]["rows"]] == ["all", "all"]
    (one,) = found["students"]
    assert one["rows"] == [] and one["parameters"] > 0
    assert "students were not evaluated: " in said(found) and "none of them of the 0 held-out prompts" in said(found)
    render(found)

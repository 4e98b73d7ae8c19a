"""Film strips and sheets: what is asked for is on them; what cannot be is told before anything is loaded."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from secondcast.evaluation.held_out import held_out_trajectories, spread
from secondcast.evaluation.pictures.picture import enlarged
from secondcast.evaluation.results import Evaluation
from secondcast.inspection.compare import names_of
from secondcast.inspection.compare_sheet import difference_factor
from secondcast.inspection.sheet import amplified_difference, font, lines_of, picture_side
from secondcast.storage_schemas.errors import SettingsError
from secondcast.storage_schemas.reader import Cache
from tests.commands.test_cli import secondcast
from tests.evaluation.recorded import ROWS, build_recorded, make_student
from tests.models.families.random_teacher import make_teacher


def told(*words, capsys) -> str:
    code, out, heard = secondcast("inspect", *words, capsys=capsys)
    assert code == 1 and not out and heard.startswith("secondcast: ") and heard.count("\n") == 1
    return heard.removeprefix("secondcast: ").strip()


def test_a_folder_gets_a_strip_of_each_trajectory_and_the_sheet(tmp_path, recorded, dev_teacher, capsys):
    words = ["images", recorded, "0", "7", "--teacher", dev_teacher, "--timesteps", "2,0", "--frame-size", 32]
    code, said, _ = secondcast("inspect", *words, "--out", tmp_path / "strips", capsys=capsys)
    keys = [Cache.open(recorded).trajectory(index).key for index in (0, 7)]
    assert code == 0 and said == f"2 film strips in {tmp_path}/strips, one file each and all in sheet.png\n"
    assert sorted(f.name for f in (tmp_path / "strips").iterdir()) == sorted(
        [f"{key}.png" for key in keys] + ["sheet.png"]
    )
    strips = [np.asarray(Image.open(tmp_path / "strips" / f"{key}.png")) for key in keys]
    assert strips[0].shape[1] == 90 + 3 * 36
    assert np.array_equal(np.concatenate(strips), np.asarray(Image.open(tmp_path / "strips/sheet.png")))


@pytest.mark.thorough
def test_pictures_that_are_there_stay_unless_asked_for(tmp_path, recorded, dev_teacher, capsys):
    words = ["images", recorded, "0", "--teacher", dev_teacher, "--timesteps", "0", "--frame-size", 32]
    (tmp_path / "strips").mkdir()
    key = Cache.open(recorded).trajectory(0).key
    for out, file in (("a.png", "a.png"), ("strips", "strips/sheet.png"), ("strips", f"strips/{key}.png")):
        (tmp_path / file).write_bytes(b"mine")
        assert told(*words, "--out", tmp_path / out, capsys=capsys) == (
            f"{tmp_path}/{file} exists and would be lost: give another --out, or --overwrite to replace it"
        )
        assert [path.read_bytes() for path in tmp_path.rglob("*.png")] == [b"mine"]
        assert secondcast("inspect", *words, "--out", tmp_path / out, "--overwrite", capsys=capsys)[0] == 0
        for path in tmp_path.rglob("*.png"):
            assert path.read_bytes().startswith(b"\x89PNG")
            path.unlink()


def test_what_cannot_be_shown_is_told_in_one_line(tmp_path, recorded, student, capsys):
    asked = ["images", recorded, "--out", tmp_path / "a.png"]
    assert told(*asked, "--timesteps", "0", "--num-frames", 2, capsys=capsys) == (
        "--num-frames and --timesteps both select the steps of a strip: give one of them"
    )
    assert told(*asked, "--timesteps", "9", capsys=capsys) == (
        f"--timesteps has step 9, but the trajectories of {recorded} have steps 0 to 2"
    )
    other = make_teacher(tmp_path / "t", seed=2, in_channels=32)
    assert told(*asked, "--teacher", other, capsys=capsys).startswith(
        f"{other}/vae decodes 16 tokens of 32 channels into 16 x 16 pixels, but the cache has 16 of 16: it is the VAE "
        "of another"
    )
    (tmp_path / "file").write_text("")
    assert told("images", recorded, "--out", tmp_path / "file", capsys=capsys).startswith(
        f"--out {tmp_path}/file cannot be created as a folder (File exists)"
    )
    assert told("compare", recorded, capsys=capsys).startswith("inspect compare needs --student RUN")
    wrong = ["compare", recorded, "--student", student, "--out", "compare.gif"]
    assert told(*wrong, capsys=capsys) == "--out is compare.gif, expected a picture such as compare.png"


@pytest.mark.parametrize("name", ["x.gif", "x.PDF", "strips.json"])
def test_an_ending_of_no_picture_makes_no_folder(tmp_path, recorded, student, name, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stem = name.split(".")[0]
    assert told("images", recorded, "--out", name, capsys=capsys) == (
        f"--out is {name}, expected a picture (.png, .jpg, .jpeg, .webp) or a folder"
    )
    assert told("report", recorded, "--out", name, capsys=capsys) == (
        f"--out is {name}, expected a page such as {stem}.html"
    )
    for words in (
        ["generate", student, "--teacher", "pocket", "--prompts", "p.txt", "--out", name],
        ["evaluate", "table", student, "--pocket", "--out", name],
    ):
        code, said, heard = secondcast(*words, capsys=capsys)
        assert (code, said) == (1, "")
        assert heard == f"secondcast: --out is {name}, which is named like a file, expected a folder: give {stem}\n"
    code, _, heard = secondcast("evaluate", "score", student, "--pocket", "--sample-grid", name, capsys=capsys)
    assert code == 1 and heard == f"secondcast: --sample-grid is {name}, expected a picture such as {stem}.png\n"
    assert not list(tmp_path.glob("*.*"))


@pytest.mark.thorough
def test_a_comparison_has_the_numbers_of_an_evaluation(tmp_path, recorded, student, t5_config, dev_teacher, capsys):
    pytest.importorskip("skimage")
    other = make_student(tmp_path / "other", t5_config, recorded)
    batch = ["--backbone", dev_teacher, "--batch-size", ROWS, "--device", "cpu", "--quiet"]
    words = ["compare", recorded, "--student", student, "--student", other, "--out", tmp_path / "sheet.png", *batch]
    code, said, _ = secondcast("inspect", *words, "--json", capsys=capsys)
    facts = json.loads(said)
    assert code == 0 and [one["name"] for one in facts["students"]] == ["s", "other"]
    score = ["evaluate", "score", student, "--cache", recorded, "--num-trajectories", 8, "--closed-loop", 8, *batch]
    assert secondcast(*score, "--out", tmp_path / "e.json", capsys=capsys)[0] == 0
    found = Evaluation.read(tmp_path / "e.json")
    rows = [row["students"]["s"] for row in facts["trajectories"]]
    assert [row["key"] for row in facts["trajectories"]] == [one.key for one in found.trajectories]
    assert [tuple(row["error_fraction_by_step"]) for row in rows] == list(found.errors.error_fraction)
    led = found.closed_loop.text_encoders["student"]
    assert [(row["psnr_db"], row["ssim"]) for row in rows] == list(zip(led.psnr_db, led.ssim, strict=True))
    assert facts["replay_error_fraction_by_step"] == [0.0] * 3
    sheet = Image.open(tmp_path / "sheet.png")
    # Pictures of 16 pixels, eight times as large.
    assert sheet.width == 24 + 5 * 134 + 180
    before = (tmp_path / "sheet.png").read_bytes()
    assert told(*words, capsys=capsys) == (
        f"{tmp_path}/sheet.png exists and would be lost: give another --out, or --overwrite to replace it"
    )
    assert (tmp_path / "sheet.png").read_bytes() == before
    code, said, _ = secondcast("inspect", *words, "--overwrite", capsys=capsys)
    assert code == 0 and "8 trajectories" in said and "all held out" in said
    for row in facts["trajectories"]:
        assert row["prompt"] in said and f"{row['students']['other']['psnr_db']:.2f} / " in said


@pytest.mark.thorough
def test_named_trajectories_are_compared_and_trained_ones_are_called_so(tmp_path, dev_teacher, t5_config, capsys):
    pytest.importorskip("skimage")
    cache = build_recorded(tmp_path / "c", dev_teacher, held_out=0, trained=ROWS, store_embeddings=False)
    student = make_student(tmp_path / "s", t5_config, cache)
    words = ["compare", cache, "--student", student, "--backbone", dev_teacher, "--batch-size", ROWS, "--quiet"]
    words += ["--out", tmp_path / "sheet.png"]
    assert told(*words, capsys=capsys).endswith("; or name trajectories to compare: `inspect compare CACHE KEY...`")
    code, said, _ = secondcast("inspect", *words, "2", "0", "2", capsys=capsys)
    assert (
        code == 0 and f"2 trajectories of {cache}, 2 of them with prompts that may have been used in training" in said
    )
    assert "replay_error" not in said


def test_students_are_named_by_their_folders_unless_two_are_called_the_same(tmp_path):
    a, b, c = (tmp_path / name for name in ("x/run", "y/run", "recorded"))
    assert names_of([a, tmp_path / "z"]) == {"run": a, "z": tmp_path / "z"}
    assert names_of([a, b, c]) == {str(a): a, str(b): b, str(c): c}
    with pytest.raises(SettingsError, match=f"--student {a} is given twice: give each student once"):
        names_of([a, a])


def test_small_pictures_keep_square_pixels_and_no_picture_is_distorted():
    assert [picture_side(pixels, largest=256) for pixels in (16, 24, 128, 200, 1024)] == [128, 120, 128, 200, 256]
    wide = np.full((8, 16, 3), 7, dtype=np.uint8)
    shown = np.asarray(enlarged(wide, 32))
    assert shown.shape == (32, 32, 3) and (shown[8:24] == 7).all() and (shown[:8] == 255).all()


def test_differences_are_amplified_as_far_as_nine_in_ten_values_stay_below_white():
    def factor(*values):
        recorded, led = np.zeros((10, 1, 3), dtype=np.uint8), np.zeros((10, 1, 3), dtype=np.uint8)
        led[: len(values), 0] = np.array(values)[:, None]
        compared = SimpleNamespace(results=["s"], pictures={"s": [led], "recorded": [recorded]})
        return difference_factor(compared)

    assert [factor(200), factor(200, 200), factor(60, 60), factor(1)] == [32, 1, 4, 32]


def test_titles_are_wrapped_and_nothing_of_them_is_cut():
    text = "a red dog " * 20 + "x" * 300
    lines = lines_of(text, 200, 13)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert max(font(13).getlength(line) for line in lines) <= 200


def test_a_difference_is_amplified_and_cut_at_white():
    a, b = (np.full((2, 2, 3), value, dtype=np.uint8) for value in (10, 200))
    assert np.array_equal(amplified_difference(a, b, 1), np.full((2, 2, 3), 190))
    assert np.array_equal(amplified_difference(b, a, 4), np.full((2, 2, 3), 255))


def test_the_default_choice_is_that_of_an_evaluation(recorded):
    from secondcast.inspection.compare import chosen_trajectories

    cache = Cache.open(recorded)
    everything = held_out_trajectories(cache)
    assert chosen_trajectories(cache, []) == [everything[place] for place in spread(everything, 8)]
    assert [one.index for one in chosen_trajectories(cache, ["3", everything[0].key, "3"])] == [3, everything[0].index]

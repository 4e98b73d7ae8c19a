"""Folders of images: file names that any disk takes, and a beginning that survives a kill."""

from hypothesis import given, settings
from hypothesis import strategies as st

from secondcast.evaluation.pictures.folder import PictureFolder, PictureSettings, picture_name


@settings(max_examples=50)
@given(st.integers(0, 10**7), st.text())
def test_every_prompt_has_a_file_name_that_any_disk_takes(number, prompt):
    name = picture_name(number, prompt)
    assert name.startswith(f"{number:06d}") and len(name) <= 80
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-.") and name.count(".") == 1
    assert picture_name(number + 1, prompt) != name


def test_a_name_tells_the_prompt():
    assert picture_name(7, "Ein  schönes, ROTES Auto!") == "000007-ein-schones-rotes-auto.png"
    assert picture_name(7, "猫") == "000007.png"


def test_a_folder_killed_before_its_settings_were_written_is_begun_anew(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/.generate.json.0badcafe-1-0badcafe.tmp").write_text("{")
    asked = PictureSettings(
        student="s", teacher="t", text_length=4, height=16, width=16, steps=2, schedule="diffusers", guidance=None,
        seed=0, dtype="float32", pooled="zero",
    )  # fmt: skip
    assert PictureFolder.open(tmp_path / "out", asked, ["a"]).missing == [0]

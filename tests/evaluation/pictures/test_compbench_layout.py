"""The folders that T2I-CompBench's scripts read."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from secondcast.evaluation.pictures.compbench_layout import write_layout
from secondcast.storage_schemas.errors import ImagesError, SettingsError

CATEGORIES = ("color", "spatial")


@dataclass(frozen=True)
class Prompted:
    file: Path
    prompt: str | None
    categories: tuple[str, ...]


def images(folder: Path, *prompts: str | None, categories=("color",), ending=".png") -> list[Prompted]:
    found = []
    for number, prompt in enumerate(prompts):
        file = folder / f"{number}{ending}"
        file.write_bytes(str(number).encode())
        found.append(Prompted(file, prompt, categories))
    return found


def test_numbers_count_the_images_of_a_category_with_those_of_a_prompt_in_succession(tmp_path):
    both = images(tmp_path, "a cat. Really", "a dog", "a cat. Really", "a dog", None)
    (tmp_path / "s").mkdir()
    spatial = images(tmp_path / "s", "a cat on a mat", categories=("spatial", "other"))
    assert write_layout([*both, *spatial], tmp_path / "out", CATEGORIES) == {"color": 4, "spatial": 1}
    assert {file.name: file.read_text() for file in (tmp_path / "out/color/samples").iterdir()} == {
        "a cat. Really_000000.png": "0",
        "a cat. Really_000001.png": "2",
        "a dog_000002.png": "1",
        "a dog_000003.png": "3",
    }
    assert [file.name for file in tmp_path.glob("out/spatial/samples/*")] == ["a cat on a mat_000000.png"]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a cat/dog", "the prompt 'a cat/dog' has '/', which the file names of T2I-CompBench's scripts cannot have: "),
        ("a cat_dog", "the prompt 'a cat_dog' has '_', which the file names"),
        ("ab" * 130, "the prompt '" + "ab" * 30 + "'... makes a file name of 271 bytes, and names have at most 255: "),
    ],
)
def test_a_prompt_that_no_file_can_be_named_by_is_refused_before_a_file_is_written(tmp_path, prompt, message):
    with pytest.raises(ImagesError) as refused:
        write_layout(images(tmp_path, "a cat", prompt), tmp_path / "out", CATEGORIES)
    assert str(refused.value).startswith(message) and str(refused.value).endswith(": leave it out of its categories")
    assert not (tmp_path / "out").exists()


def test_other_formats_no_category_and_a_folder_with_files_are_refused(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there/x").write_text("")
    with pytest.raises(SettingsError, match=r"there exists, expected a new folder: give another --out$"):
        write_layout(images(tmp_path, "a"), tmp_path / "there", CATEGORIES)
    with pytest.raises(ImagesError, match=r"0\.jpg is not a PNG file, as T2I-CompBench's scripts expect: convert it$"):
        write_layout(images(tmp_path, "a", ending=".jpg"), tmp_path / "out", CATEGORIES)
    with pytest.raises(ImagesError, match="^no image has one of the categories color, spatial: generate them from the"):
        write_layout(images(tmp_path, "a", categories=()), tmp_path / "out", CATEGORIES)

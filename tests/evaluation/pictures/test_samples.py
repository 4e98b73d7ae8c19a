"""Several images per prompt: from noise of their own, in folders that grow without remaking an image."""

import json

import pytest

from secondcast import cli
from secondcast.evaluation.pictures.folder import picture_name
from secondcast.models.noise import draw_noise
from secondcast.storage_schemas.schema.prompts import prompt_id
from tests.evaluation.test_generate import PROMPTS, StopAfter, index_of, make_student, pictures, run


@pytest.fixture(scope="module")
def student(tmp_path_factory, dev_teacher):
    folder = tmp_path_factory.mktemp("t5")
    config = json.loads((dev_teacher / "text_encoder_2/config.json").read_bytes())
    (folder / "config.json").write_text(json.dumps(config | {"d_model": 16, "num_layers": 1, "num_heads": 2}))
    return make_student(folder / "s", dev_teacher, folder)


@pytest.fixture(scope="module")
def one(tmp_path_factory, student, dev_teacher):
    folder = tmp_path_factory.mktemp("pictures") / "one"
    assert run(student, dev_teacher, folder) == 5
    return folder


@pytest.fixture(scope="module")
def three(tmp_path_factory, student, dev_teacher):
    folder = tmp_path_factory.mktemp("pictures") / "three"
    assert run(student, dev_teacher, folder, samples_per_prompt=3) == 15
    return folder


def test_the_first_sample_is_the_only_one_and_each_has_a_name_and_a_line_of_its_own(one, three):
    first, all_three = pictures(one), pictures(three)
    assert len(all_three) == 15 and len(set(all_three.values())) == 15
    assert {name: all_three[name] for name in first} == first
    assert (one / "generate.json").read_bytes() == (three / "generate.json").read_bytes()
    entries = index_of(three)
    assert [(entry["number"], entry.get("sample", 0)) for entry in entries] == [
        (n, k) for n in range(5) for k in range(3)
    ]
    assert [entry for entry in entries if "sample" not in entry] == index_of(one)
    assert entries[5] == {
        "number": 1, "prompt": "two cats", "file": "000001-two-cats_2.png", "seed": 7, "guidance": 3.5, "sample": 2,
    }  # fmt: skip


def test_a_folder_grows_from_one_to_three_without_remaking_an_image(one, three, student, dev_teacher, tmp_path):
    out = tmp_path / "out"
    run(student, dev_teacher, out)
    before = {file.name: file.stat().st_mtime_ns for file in out.glob("*.png")}
    assert run(student, dev_teacher, out, samples_per_prompt=3) == 10
    assert {name: (out / name).stat().st_mtime_ns for name in before} == before
    assert pictures(out) == pictures(three)
    assert (out / "index.jsonl").read_bytes() == (three / "index.jsonl").read_bytes()
    assert run(student, dev_teacher, out, samples_per_prompt=2) == 0 and pictures(out) == pictures(three)


@pytest.mark.parametrize("stop", [1, 5])
def test_interrupted_and_run_again_the_images_are_those_of_an_unbroken_run(three, student, dev_teacher, tmp_path, stop):
    with pytest.raises(KeyboardInterrupt):
        run(student, dev_teacher, tmp_path / "out", samples_per_prompt=3, progress=StopAfter(stop))
    (tmp_path / "out" / picture_name(1, PROMPTS[1])).unlink()
    assert run(student, dev_teacher, tmp_path / "out", samples_per_prompt=3) == 15 - 2 * stop + 1
    assert pictures(tmp_path / "out") == pictures(three)
    assert (tmp_path / "out/index.jsonl").read_bytes() == (three / "index.jsonl").read_bytes()


def test_the_noise_of_a_sample_is_shared_by_student_and_teacher(student, dev_teacher, tmp_path, monkeypatch):
    drawn = []

    def watching(**what):
        drawn.append((what["seed"], what["prompt_id"], what["sample_index"]))
        return draw_noise(**what)

    monkeypatch.setattr("secondcast.evaluation.sampling.draw_noise", watching)
    expected = [(7, prompt_id(text), sample) for sample in range(2) for text in PROMPTS[:2]]
    for name in (student, "teacher"):
        run(name, dev_teacher, tmp_path / ("s" if name is student else "t"), PROMPTS[:2], samples_per_prompt=2)
        assert drawn == expected
        drawn.clear()


def test_source_names_that_prompts_state_are_in_the_index_and_names_of_files_are_not(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plain.txt").write_text("a red circle\na blue cross\n")
    (tmp_path / "stated.jsonl").write_text('{"text": "a red circle", "source": ["complex", "complex_action"]}\n')
    words = ["generate", "teacher", "--teacher", "pocket", "--out", "out", "--steps", "1", "--quiet"]
    sources = ["--prompts", "plain.txt", "--prompts", "stated.jsonl"]
    for prompts, expected in ((sources[:2], [None, None]), (sources, [["complex", "complex_action"], None])):
        cli.app([*words, *prompts], standalone_mode=False)
        assert [entry.get("categories") for entry in index_of(tmp_path / "out")] == expected
    # A folder that has them keeps them.
    cli.app([*words, *sources[:2]], standalone_mode=False)
    assert [entry.get("categories") for entry in index_of(tmp_path / "out")] == expected
    cli.app([*words[:4], "--out", "b", *words[6:], "--prompts", "plain.txt:name=color"], standalone_mode=False)
    assert {tuple(entry["categories"]) for entry in index_of(tmp_path / "b")} == {("color",)}

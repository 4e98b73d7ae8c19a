"""T2I-CompBench's mixture on random networks: which network scores which category, and what is said of the rest."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from secondcast.evaluation.image_metrics.clip_score import ClipScore
from secondcast.evaluation.image_metrics.compbench import CompBench
from secondcast.evaluation.image_metrics.pictures import read_pictures
from secondcast.evaluation.image_metrics.scoring import score_folders
from secondcast.evaluation.image_metrics.vqa import AttributeBinding
from secondcast.evaluation.settings.networks import Networks
from secondcast.storage_schemas.errors import PromptsError
from secondcast.storage_schemas.progress import Silent
from tests.commands.test_cli import secondcast
from tests.evaluation.image_metrics.conftest import make_pictures

CPU = torch.device("cpu")
CATEGORIES = [("color",), ("non_spatial",), ("complex", "complex_action"), ("spatial",), ("color",), ("texture",)]
DETECTOR = "it needs UniDet: run the benchmark's scripts on the output of `secondcast evaluate compbench`"


@pytest.fixture
def pictures(tmp_path):
    found = read_pictures(make_pictures(tmp_path / "pictures", count=6))
    found = [replace(picture, categories=names) for picture, names in zip(found, CATEGORIES, strict=True)]
    found[2] = replace(found[2], prompt="a red book", without_adjectives="a book")
    # The prompts of the folder repeat after four.
    found[4] = replace(found[4], prompt="a blue cup")
    return found


def metric(vqa, clip):
    return CompBench(str(vqa), str(clip), batch_size=4, device=CPU)


def test_each_category_is_scored_by_its_network_and_the_average_is_over_categories(blip, clip, pictures):
    average, action = metric(blip, clip).score(pictures, Silent())
    vqa = AttributeBinding(str(blip), batch_size=1, device=CPU).score(pictures, Silent())[0].values
    plain = [replace(p, prompt=p.without_adjectives or p.prompt) for p in pictures]
    cosine = ClipScore(str(clip), batch_size=1, device=CPU).cosines(plain, Silent())
    first, non_spatial, complex_action, _, second, texture = (p.name for p in pictures)
    assert average.values == {
        first: pytest.approx(vqa[first], rel=1e-4),
        second: pytest.approx(vqa[second], rel=1e-4),
        texture: pytest.approx(vqa[texture], rel=1e-4),
        non_spatial: pytest.approx(cosine[non_spatial], rel=1e-4),
    }
    expected = [(vqa[first] + vqa[second]) / 2, vqa[texture], cosine[non_spatial]]
    assert average.mean == pytest.approx(np.mean(expected), rel=1e-4) and average.count == 4
    assert action.name == "compbench-complex-action"
    mixed = (vqa[complex_action] + cosine[complex_action]) / 2
    assert action.values == {complex_action: pytest.approx(mixed, rel=1e-4)}


def test_the_average_names_the_categories_that_it_has_and_lacks(blip, clip, pictures):
    average, _ = metric(blip, clip).score(pictures, Silent())
    assert average.parts == ("color", "texture", "non_spatial") and average.phrases == "word rules"
    assert average.missing == {
        "complex": "prompts with spatial relations need UniDet" + DETECTOR.removeprefix("it needs UniDet"),
        "spatial": DETECTOR,
        "shape": "no images",
    }
    assert average.model == f"{blip}, {clip}" and average.revision.count("sha256:") == 2


@pytest.mark.parametrize(("absent", "parts"), [("vqa", ("non_spatial",)), ("clip", ("color", "texture"))])
def test_without_one_network_the_other_scores_what_it_can(blip, clip, pictures, absent, parts):
    networks = {"vqa": blip, "clip": clip} | {absent: "no-such-folder"}
    flag = {"vqa": "--vqa-model", "clip": "--compbench-clip-model"}[absent]
    found = metric(**networks)
    assert found.available() is None
    (average,) = found.score(pictures, Silent())
    assert average.parts == parts
    lacking = [name for name, why in average.missing.items() if why.endswith(f"give another {flag}")]
    assert lacking == (["color", "shape", "texture"] if absent == "vqa" else ["non_spatial"]) + ["complex_action"]
    both = metric("no-such-folder", "no-such-folder").available()
    assert both is not None and "--vqa-model; " in both and both.endswith("give another --compbench-clip-model")


def test_pictures_without_a_category_are_refused_with_what_to_give(blip, clip, pictures):
    plain = [replace(picture, categories=("spatial",)) for picture in pictures]
    with pytest.raises(PromptsError, match="has one of the categories color, .*, complex_action: give --prompts with"):
        metric(blip, clip).check(plain)


def test_several_samples_of_a_prompt_are_one_unit_of_every_score(blip, clip, pictures):
    twice = [replace(p, name=f"{p.name}-{k}", file=p.file) for p in pictures for k in range(2)]
    once, doubled = (score_folders([metric(blip, clip)], {"f": images}, Silent()) for images in (pictures, twice))
    for one, two in zip(once.scored["f"], doubled.scored["f"], strict=True):
        assert two.mean == pytest.approx(one.mean, rel=1e-4) and two.count == 2 * one.count
        assert (two.interval, two.low is None) == (one.interval, one.low is None)
        if one.low is not None:
            assert (two.low, two.high) == pytest.approx((one.low, one.high), rel=1e-4)
    assert [score.interval for score in doubled.scored["f"]] == ["bootstrap", "none"]
    assert list(doubled.categories["f"]) == ["color", "non_spatial", "complex", "complex_action", "texture"]


def test_the_command_reports_categories_in_the_table_and_in_json(blip, clip, tmp_path, capsys):
    folder = make_pictures(tmp_path / "p")
    lines = [json.loads(line) for line in (folder / "index.jsonl").read_text().splitlines()]
    for entry, category in zip(lines, ("color", "color", "shape", "spatial"), strict=True):
        entry["categories"] = [category]
    (folder / "index.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in lines))
    words = ["evaluate", "images", folder, "--metrics", "compbench,vqa", "--vqa-model", blip, "--quiet"]
    words += ["--compbench-clip-model", clip, "--device", "cpu"]
    code, said, _ = secondcast(*words, "--json", capsys=capsys)
    (found,) = json.loads(said)["folders"]
    assert code == 0 and {name: [s["name"] for s in scores] for name, scores in found["categories"].items()} == {
        "color": ["vqa", "compbench"], "shape": ["vqa", "compbench"], "spatial": ["vqa"],
    }  # fmt: skip
    color = found["categories"]["color"][0]
    values = found["scores"][0]["values"]
    assert color["mean"] == pytest.approx((values["000000.png"] + values["000001.png"]) / 2) and "values" not in color
    code, said, _ = secondcast(*words, capsys=capsys)
    assert code == 0 and "│   color   " in said and "; phrases by word rules" in said
    assert "compbench is the mean of color, shape, not the benchmark's average: it lacks\n" in said
    assert f"\n  spatial: {DETECTOR}\n" in said and "\n  complex, texture, non_spatial: no images\n" in said


def test_the_command_writes_the_layout_of_the_benchmarks_scripts(tmp_path, capsys):
    folder = make_pictures(tmp_path / "p", count=2, index=False)
    prompts = tmp_path / "val.jsonl"
    prompts.write_text(
        '{"text": "a cat on a mat", "source": "spatial", "file": "000000.png"}\n'
        '{"text": "two cats", "source": "numeracy", "file": "000001.png"}\n'
    )
    words = ["evaluate", "compbench", folder, "--prompts", prompts, "--out", tmp_path / "out"]
    code, said, _ = secondcast(*words, capsys=capsys)
    assert (code, said) == (0, f"{tmp_path}/out/numeracy: 1 image\n{tmp_path}/out/spatial: 1 image\n")
    assert (tmp_path / "out/spatial/samples/a cat on a mat_000000.png").is_file()
    code, _, heard = secondcast(*words, capsys=capsys)
    assert code == 1 and heard == f"secondcast: {tmp_path}/out exists, expected a new folder: give another --out\n"


def test_the_published_values_of_the_benchmarks_own_pictures_are_met():
    # README and examples/reward/vqa_result.json of Karine-Huang/T2I-CompBench, for the pictures of examples/samples.
    published = {
        "a green bench and a blue bowl_000000.png": 0.7110,
        "a brown horse and a blue vase_000001.png": 0.9217,
        "a blue bench and a green cake_000002.png": 0.8554,
    }
    samples = os.environ.get("T2I_COMPBENCH_SAMPLES")
    if not samples:
        pytest.skip("T2I_COMPBENCH_SAMPLES does not name examples/samples of the repository Karine-Huang/T2I-CompBench")
    blip = AttributeBinding(Networks().vqa_model, batch_size=3, device=CPU)
    if (why := blip.available()) is not None:
        pytest.skip(why)
    pictures = read_pictures(Path(samples))
    pictures = [replace(p, prompt=p.name.split("_")[0]) for p in pictures if p.name in published]
    # The published values are of images of 480 px, the converted checkpoint takes 384 px. How far apart they are was
    # not measured yet: the tolerance is a guess.
    assert blip.score(pictures, Silent())[0].values == pytest.approx(published, abs=0.05)

"""Each metric on real architectures with random weights: equal to a computation by other means."""

import json
import math
import shutil
import sys
from dataclasses import replace
from importlib.metadata import version
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from scipy.linalg import sqrtm
from torchmetrics.image.fid import FrechetInceptionDistance
from transformers import AutoImageProcessor, AutoTokenizer, BlipForQuestionAnswering, CLIPModel

from secondcast.evaluation.image_metrics import fid as fid_module
from secondcast.evaluation.image_metrics.clip_score import ClipScore
from secondcast.evaluation.image_metrics.fid import ClipFeatures, Fid, InceptionFeatures
from secondcast.evaluation.image_metrics.pictures import read_pictures
from secondcast.evaluation.image_metrics.recognisers import TrOcr
from secondcast.evaluation.image_metrics.text_rendering import TextRendering
from secondcast.evaluation.image_metrics.vqa import AttributeBinding
from secondcast.evaluation.intervals import bootstrap
from secondcast.storage_schemas.errors import PromptsError, SettingsError
from secondcast.storage_schemas.progress import Silent
from tests.evaluation.image_metrics.conftest import make_pictures

CPU = torch.device("cpu")


class Noted(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, message: str) -> None:
        self.said.append(message)


def clip_cosines(folder, pictures) -> list[float]:
    """One picture at a time, by the two halves of CLIP."""
    network = CLIPModel.from_pretrained(folder).eval()
    tokenizer, processor = AutoTokenizer.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder)
    cosines = []
    for picture in pictures:
        tokens = tokenizer([picture.prompt], truncation=True, max_length=20, return_tensors="pt")
        pixels = processor(images=[picture.pixels()], return_tensors="pt")
        with torch.no_grad():
            text = network.text_projection(network.text_model(**tokens).pooler_output)
            image = network.visual_projection(network.vision_model(**pixels).pooler_output)
        cosines.append(float(torch.nn.functional.cosine_similarity(text, image)))
    return cosines


def test_clip_score_is_a_hundred_times_the_cosine_and_never_negative(clip, tmp_path):
    pictures = read_pictures(make_pictures(tmp_path / "p", count=8))
    # Both signs: prompts of random weights lie anywhere.
    pictures = [replace(picture, prompt=word) for picture, word in zip(pictures, "abcdefgh", strict=True)]
    cosines = clip_cosines(clip, pictures)
    assert min(cosines) < 0 < max(cosines)
    (scored,) = ClipScore(str(clip), batch_size=3, device=CPU).score(pictures, Silent())
    assert list(scored.values.values()) == pytest.approx([100 * max(c, 0) for c in cosines], abs=1e-3)
    assert scored.mean == pytest.approx(np.mean(list(scored.values.values())))
    assert scored.count == 8 and scored.interval == "bootstrap" and scored.low <= scored.mean <= scored.high
    assert scored.model == str(clip) and scored.revision.startswith("sha256:")


def test_prompts_longer_than_clip_reads_are_cut_and_counted(clip, pictures):
    progress = Noted()
    ClipScore(str(clip), batch_size=2, device=CPU).score(read_pictures(pictures), progress)
    assert progress.said == ["clip-score: 2 of 4 prompts are longer than CLIP's 20 tokens and were truncated"]


def features(folder, pictures) -> np.ndarray:
    network, processor = CLIPModel.from_pretrained(folder).eval(), AutoImageProcessor.from_pretrained(folder)
    pixels = processor(images=[picture.pixels() for picture in pictures], return_tensors="pt")
    with torch.no_grad():
        found = network.visual_projection(network.vision_model(**pixels).pooler_output)
    return found.double().numpy()


def kernel_of(a_ND: np.ndarray, b_ND: np.ndarray) -> np.ndarray:
    """The polynomial kernel of KID."""
    return (a_ND @ b_ND.T / a_ND.shape[1] + 1) ** 3


def test_kid_of_sets_of_different_sizes_is_a_mean_over_subsets_and_always_the_same(clip, tmp_path):
    few = read_pictures(make_pictures(tmp_path / "few", count=3))
    many = read_pictures(make_pictures(tmp_path / "many", seed=1, count=8))
    first, again = (Fid(ClipFeatures(str(clip), device=CPU), few, batch_size=3).score(many, Silent()) for _ in range(2))
    assert first[1].mean == again[1].mean
    a, b = features(clip, few), features(clip, many)
    picked = [np.ix_(rows, rows) for rows in combinations(range(8), 3)]
    inner, mixed = kernel_of(b, b), kernel_of(a, b)
    own = (kernel_of(a, a).sum() - kernel_of(a, a).trace()) / 6
    exact = [
        own + (inner[rows].sum() - inner[rows].trace()) / 6 - 2 * mixed[:, rows[1][0]].mean() for rows in picked
    ]  # fmt: skip
    # A mean of 100 draws of 56 subsets: six standard errors.
    assert abs(first[1].mean - 1000 * np.mean(exact)) < 6 * 1000 * np.std(exact) / 10


def test_fid_is_the_frechet_distance_and_nothing_for_the_folder_itself(clip, tmp_path):
    one = read_pictures(make_pictures(tmp_path / "one", count=8))
    other = read_pictures(make_pictures(tmp_path / "other", seed=1, count=8, side=24))
    progress = Noted()
    fid = Fid(ClipFeatures(str(clip), device=CPU), one, batch_size=3)
    (same, _), (far, kernel) = fid.score(one, progress), fid.score(other, progress)
    a, b = features(clip, one), features(clip, other)
    root = sqrtm(np.cov(a.T) @ np.cov(b.T)).trace().real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.cov(a.T).trace() + np.cov(b.T).trace() - 2 * root
    assert far.mean == pytest.approx(expected, rel=1e-4) and far.mean > 1
    assert same.mean == pytest.approx(0, abs=1e-3 * far.mean)
    assert (far.name, far.interval, far.low) == ("fid-clip", "none", None)
    assert kernel.name == "kid-clip"
    # Without the diagonals: unbiased.
    near, other_near, cross = (kernel_of(*pair) for pair in ((a, a), (b, b), (a, b)))
    within = sum((one.sum() - one.trace()) / (8 * 7) for one in (near, other_near))
    assert kernel.mean == pytest.approx(1000 * (within - 2 * cross.mean()), rel=1e-4)
    assert progress.said[0] == (
        "fid of 8 images against 8: 8 features need more images than that on both sides; compare only values "
        "from the same numbers of images"
    )


def test_fid_takes_pictures_of_several_sizes(clip, tmp_path):
    small = make_pictures(tmp_path / "small", count=2)
    large = make_pictures(tmp_path / "large", count=2, side=32)
    mixed = [*read_pictures(small), *read_pictures(large)]
    scored, _ = Fid(ClipFeatures(str(clip), device=CPU), mixed, batch_size=4).score(mixed, Silent())
    assert scored.count == 4


def test_fid_of_one_picture_is_refused(clip, pictures):
    one = read_pictures(pictures)[:1]
    with pytest.raises(SettingsError, match="^fid of 1 image against 1: expected at least two on each side$"):
        Fid(ClipFeatures(str(clip), device=CPU), one, batch_size=1).score(one, Silent())


def test_vqa_multiplies_the_probabilities_of_yes(blip, pictures):
    (first, *_) = read_pictures(pictures)
    first = replace(first, phrases=("a red book", "a blue cup"))
    singles = [replace(first, phrases=(phrase,)) for phrase in first.phrases]
    metric = AttributeBinding(str(blip), batch_size=4, device=CPU)
    product = metric.score([first], Silent())[0].mean
    factors = [metric.score([single], Silent())[0].mean for single in singles]
    assert product == pytest.approx(math.prod(factors), rel=1e-5) and 0 < product < min(factors)


def test_a_factor_of_vqa_is_what_blips_own_forward_gives(blip, pictures):
    pictures = [replace(p, phrases=("a red book",)) for p in read_pictures(pictures)]
    network = BlipForQuestionAnswering.from_pretrained(blip).eval()
    tokenizer, processor = AutoTokenizer.from_pretrained(blip), AutoImageProcessor.from_pretrained(blip)
    tokens = tokenizer(["a red book?"] * 4, return_tensors="pt")
    # [DEC] and [ENC], as BLIP was trained.
    dec, enc = 13, 14
    tokens.input_ids[:, 0] = enc
    pixels = processor(images=[picture.pixels() for picture in pictures], return_tensors="pt").pixel_values
    with torch.no_grad():
        seen = network.vision_model(pixel_values=pixels)[0]
        question = network.text_encoder(**tokens, encoder_hidden_states=seen)[0]
        logits = network.text_decoder(torch.full((4, 1), dec), encoder_hidden_states=question).logits[:, 0]
    yes_and_no = logits.softmax(-1)[:, tokenizer.convert_tokens_to_ids(["yes", "no"])]
    expected = yes_and_no[:, 0] / yes_and_no.sum(-1)
    (scored,) = AttributeBinding(str(blip), batch_size=3, device=CPU).score(pictures, Silent())
    assert list(scored.values.values()) == pytest.approx(expected.tolist(), rel=1e-4)


def test_a_value_of_vqa_does_not_depend_on_the_other_questions_of_a_batch(blip, pictures):
    # Questions of several lengths are padded in a batch.
    phrases = [("a red book", "cup"), ("a red book and a blue cup and a red cup",), ("a",), ("a cup a cup",)]
    pictures = [replace(p, phrases=texts) for p, texts in zip(read_pictures(pictures), phrases, strict=True)]
    one, all_five = (AttributeBinding(str(blip), batch_size=size, device=CPU) for size in (1, 5))
    expected = one.score(pictures, Silent())[0].values
    assert all_five.score(pictures, Silent())[0].values == pytest.approx(expected, rel=1e-4)
    assert all(1e-4 < value < 0.9999 for value in expected.values())


def test_vqa_leaves_out_pictures_whose_prompts_name_nothing(blip, pictures):
    named, silent = read_pictures(pictures)[:2]
    silent = replace(silent, prompt="it is there")
    metric, progress = AttributeBinding(str(blip), batch_size=4, device=CPU), Noted()
    assert metric.score([named, silent], progress)[0].count == 1
    assert progress.said == ["vqa: skipped 1 image, whose prompts have no phrases"]
    with pytest.raises(
        PromptsError, match="^vqa: no prompt of .*pictures names an object: give --prompts JSONL with `phr"
    ):
        metric.score([silent], Silent())


def test_text_is_right_where_the_recogniser_reads_what_was_asked_for(trocr, pictures):
    recogniser = TrOcr(str(trocr), device=CPU)
    found = read_pictures(pictures)
    reading = recogniser.read(found)
    assert all(reading)
    metric = TextRendering(recogniser, batch_size=2)
    scores = metric.score([replace(p, text=t) for p, t in zip(found, reading, strict=True)], Silent())
    names = ["text", "text-whole", "text-words", "text-exact"]
    assert [(score.name, score.mean, score.count) for score in scores] == [(name, 1, 4) for name in names]
    exact = scores[-1]
    assert exact.interval == "wilson" and exact.low < 1 and exact.high == 1
    # The text that the third prompt quotes; the others quote none.
    progress = Noted()
    right, *_, exact = metric.score(found, progress)
    assert list(right.values) == ["000002.png"] and right.mean < 1 and exact.mean == 0
    assert progress.said == ["text: skipped 3 images, whose prompts quote no text"]
    with pytest.raises(
        PromptsError, match="^text: no prompt of .*pictures quotes one such as 'open': give --prompts JS"
    ):
        metric.score(found[:2], Silent())


def test_trocr_reads_without_the_pooler_that_published_checkpoints_lack(trocr, pictures, tmp_path):
    folder = tmp_path / "published"
    shutil.copytree(trocr, folder)
    weights = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in weights.items() if not name.startswith("encoder.pooler.")}
    assert len(kept) < len(weights)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    found = read_pictures(pictures)
    assert TrOcr(str(folder), device=CPU).read(found) == TrOcr(str(trocr), device=CPU).read(found)


def test_each_metric_names_what_it_needs(clip, blip, trocr):
    metrics = (
        ClipScore("a/clip", batch_size=1, device=CPU),
        AttributeBinding("a/blip", batch_size=1, device=CPU),
        TextRendering(TrOcr("a/trocr", device=CPU), batch_size=1),
        Fid(InceptionFeatures(None, device=CPU), [], batch_size=1),
    )
    assert [metric.needs.weights for metric in metrics] == ["a/clip", "a/blip", "a/trocr", fid_module.INCEPTION_FILE]
    assert all(metric.needs.packages and metric.needs.how for metric in metrics)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=2, max_size=20), st.floats(-5, 5))
def test_bootstrap_intervals_lie_within_the_values_and_move_with_them(values, shift):
    low, high = bootstrap(values)
    assert min(values) - 1e-9 <= low <= high <= max(values) + 1e-9
    assert bootstrap([value + shift for value in values]) == pytest.approx((low + shift, high + shift), abs=1e-9)
    assert bootstrap(values[:1]) is None


def test_inception_without_its_packages_says_so(pictures, monkeypatch):
    monkeypatch.setattr(fid_module, "find_spec", lambda name: None)
    fid = Fid(InceptionFeatures(None, device=CPU), read_pictures(pictures), batch_size=1)
    assert fid.available() == (
        "fid with Inception's features needs torch-fidelity, which is not installed: pip install "
        "'secondcast[metrics]', or --fid-features clip"
    )


def test_inceptions_weights_that_are_not_there_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(fid_module, "find_spec", lambda name: True)
    assert InceptionFeatures(tmp_path / "no.pth", device=CPU).absent() == (
        f"no file {tmp_path}/no.pth for --fid-weights: expected weights-inception-2015-12-05-6726825d.pth, downloaded "
        f"from github.com/toshas/torch-fidelity/releases if there is a network, else give the file with "
        f"--fid-weights"
    )


def test_fid_resizes_as_published_fids_do_and_names_the_versions(clip, pictures, monkeypatch):
    given = {}

    class Asked(FrechetInceptionDistance):
        def __init__(self, **how):
            given.update(how)
            super().__init__(**(how | {"feature": torch.nn.Flatten(), "input_img_size": (3, 20, 20)}))

    monkeypatch.setattr("torchmetrics.image.fid.FrechetInceptionDistance", Asked)
    InceptionFeatures(None, device=CPU).metric()
    assert (given["feature"], given["antialias"]) == (2048, False)
    monkeypatch.undo()
    found = read_pictures(pictures)
    scored, _ = Fid(ClipFeatures(str(clip), device=CPU), found, batch_size=4).score(found, Silent())
    assert (
        scored.json_value()["library"]
        == f"torchmetrics {version('torchmetrics')}, transformers {version('transformers')}"
    )


def test_a_torchmetrics_that_cannot_resize_so_is_refused_by_its_version(clip, pictures, monkeypatch):
    monkeypatch.setattr("torchmetrics.image.fid.FrechetInceptionDistance", lambda feature: None)
    fid = Fid(ClipFeatures(str(clip), device=CPU), read_pictures(pictures), batch_size=1)
    assert fid.available() == (
        f"fid needs torchmetrics 1.8 or newer, found {version('torchmetrics')}: pip install 'secondcast[metrics]'"
    )


def test_without_torchmetrics_or_with_a_broken_one_fid_says_why(clip, pictures, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "torchmetrics"]:
        monkeypatch.delitem(sys.modules, name)
    fid = Fid(ClipFeatures(str(clip), device=CPU), read_pictures(pictures), batch_size=1)
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "torchmetrics", None)
        assert fid.available() == "fid needs torchmetrics, which is not installed: pip install 'secondcast[metrics]'"
    # What happens with torch-fidelity installed and torchvision absent.
    (tmp_path / "torchmetrics").mkdir()
    (tmp_path / "torchmetrics/__init__.py").write_text("raise RuntimeError('operator torchvision::nms is missing')")
    monkeypatch.syspath_prepend(tmp_path)
    assert fid.available() == (
        "fid: torchmetrics cannot be imported (RuntimeError: operator torchvision::nms is missing): pip install "
        "'secondcast[metrics]'"
    )


def test_scores_are_json(clip, pictures):
    scored = ClipScore(str(clip), batch_size=2, device=CPU).score(read_pictures(pictures), Silent())[0]
    assert json.loads(json.dumps(scored.json_value()))["values"].keys() == {f"{i:06d}.png" for i in range(4)}

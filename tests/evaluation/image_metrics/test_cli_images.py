"""`secondcast evaluate images` as a user meets it: a table, one line for what cannot run, no traceback."""

import io
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from secondcast.evaluation.image_metrics.weights import Weights
from secondcast.evaluation.pictures.folder import PictureFolder, PictureSettings
from tests.commands.test_cli import secondcast
from tests.evaluation.image_metrics.conftest import PROMPTS, make_pictures
from tests.evaluation.image_metrics.tiny_networks import make_clip
from tests.models.teacher.small_hub import NAME, Repository, run_apart, serve

TEXT = ("text", "text-whole", "text-words", "text-exact")


def images(*words, capsys, device="cpu"):
    return secondcast("evaluate", "images", *words, "--device", device, capsys=capsys)


@pytest.mark.thorough
def test_all_metrics_on_two_folders(clip, blip, trocr, pictures, tmp_path, capsys):
    other = make_pictures(tmp_path / "other", seed=1)
    words = [pictures, other, "--reference", other, "--fid-features", "clip", "--batch-size", "3"]
    words += ["--clip-model", clip, "--vqa-model", blip, "--ocr", "trocr", "--ocr-model", trocr]
    code, said, heard = images(*words, "--json", capsys=capsys)
    assert code == 0 and "Traceback" not in heard
    found = json.loads(said)
    assert found["skipped"] == [] and [folder["pictures"] for folder in found["folders"]] == [4, 4]
    for folder in found["folders"]:
        scores = {score["name"]: score for score in folder["scores"]}
        assert list(scores) == ["clip-score", "fid-clip", "kid-clip", "vqa", *TEXT]
        assert [score["count"] for score in scores.values()] == [4, 4, 4, 4, 1, 1, 1, 1]
        assert {score["model"] for score in scores.values()} == {str(clip), str(blip), str(trocr)}
        assert 0 <= scores["vqa"]["low"] <= scores["vqa"]["mean"] <= scores["vqa"]["high"] <= 1
    far, near = (folder["scores"][1]["mean"] for folder in found["folders"])
    assert near < 1e-3 * far
    words = [pictures, other, "--vqa-model", blip, "--ocr", "trocr", "--ocr-model", trocr]
    code, said, _ = images(*words, "--metrics", "vqa,text", "--quiet", capsys=capsys)
    assert code == 0 and "vqa" in said and "text-exact" in said and "clip-score" not in said
    assert f"vqa: {blip} at sha256:" in said and "of 1" in said


def test_what_cannot_run_says_why_and_the_rest_goes_on(clip, pictures, capsys):
    words = [pictures, "--metrics", "clip-score,fid,vqa,text", "--clip-model", clip, "--vqa-model", "no-such-folder"]
    code, said, heard = images(*words, "--ocr", "trocr", "--ocr-model", clip, "--quiet", capsys=capsys)
    assert code == 0 and "clip-score" in said
    assert heard.splitlines()[-3:] == [
        "no fid: fid needs reference images: give --reference FOLDER, such as the teacher's images from generate",
        "no vqa: no weights 'no-such-folder': neither a folder nor a hub name such as "
        "openai/clip-vit-large-patch14; give another --vqa-model",
        f"no text: {clip} has model_type 'clip', expected 'vision-encoder-decoder': give another --ocr-model",
    ]


def only_clip(pictures, folder, capsys):
    code, said, heard = images(pictures, "--metrics", "clip-score", "--clip-model", folder, "--quiet", capsys=capsys)
    assert code == 1 and said == "" and "Traceback" not in heard
    return heard.splitlines()[-1]


def test_weights_that_cannot_be_used_are_one_line_and_exit_1(clip, pictures, tmp_path, capsys):
    folder = tmp_path / "clip"
    shutil.copytree(clip, folder)
    # A copy: tensors of a file can be mapped into memory, and the file is overwritten below.
    weights = {name: value.clone() for name, value in load_file(folder / "model.safetensors").items()}
    dropped = {name: value for name, value in weights.items() if name != "text_projection.weight"}
    save_file(dropped, folder / "model.safetensors", metadata={"format": "pt"})
    assert only_clip(pictures, folder, capsys) == (
        f"no clip-score for {pictures}: {folder} cannot be loaded: 1 of the 46 tensors of CLIPModel is missing "
        f"(text_projection.weight): the file is incomplete; download it again, or give another --clip-model"
    )
    (folder / "model.safetensors").write_bytes(b"\0" * 20)
    assert only_clip(pictures, folder, capsys).startswith(
        f"no clip-score for {pictures}: {folder} cannot be loaded: model.safetensors is not a whole "
    )
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    assert only_clip(pictures, folder, capsys) == (
        f"no clip-score: {folder} has no *.safetensors, only pytorch_model.bin: pickled weights can run code and are "
        f"never read; if you trust them, load them, convert them to safetensors with save_pretrained(FOLDER), and give "
        f"--clip-model FOLDER"
    )
    (folder / "config.json").unlink()
    assert only_clip(pictures, folder, capsys) == (
        f"no clip-score: {folder} has no readable config.json: expected a transformers model; give another --clip-model"
    )


def test_weights_that_were_never_fetched_name_the_command_that_fetches_them(pictures, monkeypatch, tmp_path, capsys):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    code, _, heard = images(pictures, "--ocr", "trocr", "--quiet", capsys=capsys)
    assert code == 1
    for line, (metric, name, flag) in zip(
        heard.splitlines()[-3:],
        [
            ("clip-score", "openai/clip-vit-large-patch14", "--clip-model"),
            ("vqa", "Salesforce/blip-vqa-base", "--vqa-model"),
            ("text", "microsoft/trocr-base-printed", "--ocr-model"),
        ],
        strict=True,
    ):
        assert line == (
            f"no {metric}: the weights {name} are not available and could not be downloaded "
            f"(LocalEntryNotFoundError): run "
            f"`hf download {name}` where there is a network, or give {flag} FOLDER"
        )


def test_without_tesseract_the_text_metric_says_so(pictures, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    code, _, heard = images(pictures, "--metrics", "text", "--ocr", "tesseract", capsys=capsys)
    assert code == 1 and heard.splitlines()[-1] == (
        "no text: --ocr tesseract needs the program tesseract on the PATH: install tesseract-ocr, or give --ocr "
        "rapidocr"
    )


def test_a_tesseract_that_fails_is_one_line(pictures, monkeypatch, tmp_path, capsys):
    program = tmp_path / "tesseract"
    program.write_text("#!/bin/sh\necho 'Error opening data file eng.traineddata' >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    code, _, heard = images(pictures, "--metrics", "text", "--ocr", "tesseract", capsys=capsys)
    assert code == 1 and heard.splitlines()[-1] == (
        f"no text for {pictures}: tesseract ended with code 1 (Error opening data file eng.traineddata): install "
        f"tesseract-ocr with its English data, or give --ocr rapidocr"
    )


def test_what_generate_writes_is_scored_by_its_index(clip, tmp_path, capsys):
    settings = PictureSettings(
        student="s", teacher="t", text_length=4, height=16, width=16, steps=2, schedule="diffusers", guidance=None,
        seed=0, dtype="float32", pooled="zero",
    )  # fmt: skip
    folder = PictureFolder.open(tmp_path / "made", settings, PROMPTS)
    folder.add(range(4), np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8))
    words = ["--metrics", "clip-score", "--clip-model", clip, "--json"]
    found = json.loads(images(tmp_path / "made", *words, capsys=capsys)[1])
    assert list(found["folders"][0]["scores"][0]["values"])[3] == "000003-a-red-cup.png"


@pytest.mark.thorough
def test_any_folder_of_pictures_can_be_scored_with_its_prompts(clip, trocr, tmp_path, capsys):
    folder = make_pictures(tmp_path / "plain", index=False)
    words = ["--metrics", "clip-score", "--clip-model", clip, "--json"]
    code, _, heard = images(folder, *words, capsys=capsys)
    assert code == 1 and heard.splitlines()[-1] == (
        f"no clip-score for {folder}: clip-score needs the prompts of the images, but {folder} has no index.jsonl: "
        f"give them with --prompts FILE"
    )
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS) + "\n")
    by_name = json.loads(images(folder, *words, "--prompts", prompts, capsys=capsys)[1])
    indexed = make_pictures(tmp_path / "indexed")
    by_index = json.loads(images(indexed, *words, capsys=capsys)[1])
    assert by_name["folders"][0]["scores"] == by_index["folders"][0]["scores"]
    named = tmp_path / "named.jsonl"
    named.write_text('{"prompt": "a sign", "text": "go", "file": "000003.png"}\n')
    words = ["--metrics", "text", "--ocr", "trocr", "--ocr-model", trocr, "--json"]
    found = json.loads(images(folder, *words, "--prompts", named, capsys=capsys)[1])
    assert list(found["folders"][0]["scores"][0]["values"]) == ["000003.png"]


def test_pictures_of_one_file_name_in_several_subfolders_each_have_a_value(clip, tmp_path, capsys):
    # Its name holds what rich takes for markup.
    folder = tmp_path / "of[/b]"
    lines = []
    for seed, prompt in enumerate(PROMPTS[:2]):
        make_pictures(folder / str(seed), seed=seed, count=1, index=False)
        lines.append(json.dumps({"prompt": prompt, "file": f"{seed}/000000.png"}))
    named = tmp_path / "named.jsonl"
    named.write_text("\n".join(lines))
    words = [folder, "--prompts", named, "--metrics", "clip-score", "--clip-model", clip]
    (score,) = json.loads(images(*words, "--json", capsys=capsys)[1])["folders"][0]["scores"]
    assert score["count"] == 2 and list(score["values"]) == ["0/000000.png", "1/000000.png"]
    assert images(*words, capsys=capsys)[0] == 0


def test_a_prompts_file_adds_phrases_to_the_prompts_of_an_index(blip, pictures, tmp_path, capsys):
    words = [pictures, "--metrics", "vqa", "--vqa-model", blip, "--json"]
    more = tmp_path / "more.jsonl"
    more.write_text(json.dumps({"prompt": PROMPTS[1], "phrases": ["a red cup", "a cup"]}) + "\n")
    plain, changed = (
        json.loads(images(*words, *extra, capsys=capsys)[1])["folders"][0]["scores"][0]["values"]
        for extra in ([], ["--prompts", more])
    )
    assert [file for file in plain if plain[file] != changed[file]] == ["000001.png"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (
            "p.jsonl",
            '{"prompt": "a", "phrase": ["b"]}\n',
            "p.jsonl line 1 has the column 'phrase', expected 'phrases': rename it",
        ),
        (
            "p.jsonl",
            '{"prompt": "a", "phrases": "b"}\n',
            "p.jsonl line 1, column 'phrases': Input should be a valid tuple: expected file and text as strings, "
            "phrases as a list",
        ),
        ("p.jsonl", '{"prompt": "a", "File_name": "000001.png"}', "line 1 has the column 'file_name', expected 'file'"),
        ("p.jsonl", '{"prompt": "", "file": "000001.png"}', "line 1 names 000001.png but has no prompt: add one"),
        ("p.jsonl", '{"prompt": "a"\n', "p.jsonl line 1 column 15 is not JSON (Expecting ',' delimiter)"),
        ("p.json", '{\n"prompts": ["a"]}', "p.json is an object, expected a list of strings or of objects"),
        ("p.txt", "\n", "p.txt is empty: expected one prompt per line"),
        ("p.txt", "\u200b\n", "--prompts {file} has no prompts, expected one per picture"),
        (
            "p.txt",
            "prompt,id\na,1\n",
            "p.txt line 1 is 'prompt,id', the header of a table: append :column=prompt to read",
        ),
        ("p.csv", "words;id\na;1\n", "p.csv line 1 has the columns words, id and none of prompt, text, caption: name"),
        ("nix/p.txt", None, "no prompt file {file}: expected a text file (a prompt per line)"),
        (
            "p.txt",
            "a\nb\n",
            "plain has 4 images and --prompts 2 prompts: expected equal numbers, in the order",
        ),
        ("p.jsonl", '{"prompt": "a", "file": "x.png"}', "plain has no x.png, which --prompts names: expected an image"),
        (
            "p.jsonl",
            '{"prompt": "a", "file": "../p.jsonl"}',
            "plain has no ../p.jsonl, which --prompts names",
        ),
        (
            "p.jsonl",
            '{"prompt": "a", "file": "000001.png"}\n{"prompt": "b"}',
            "--prompts has no `file` for 'b'",
        ),
        (
            "p.jsonl",
            '{"prompt": "a", "file": "000001.png"}\n{"prompt": "b", "file": "000001.png"}',
            "--prompts names 000001.png more than once: an image has one score, hence one prompt; name it once",
        ),
    ],
)
def test_prompts_that_do_not_fit_are_one_line(name, content, said, tmp_path, capsys):
    folder = make_pictures(tmp_path / "plain", index=False)
    if content is not None:
        (tmp_path / name).write_text(content)
    code, _, heard = images(folder, "--prompts", tmp_path / name, capsys=capsys)
    assert code == 1 and len(heard.splitlines()) == 1 and said.format(file=tmp_path / name) in heard


def test_prompts_of_pictures_are_read_as_those_of_a_build(blip, tmp_path, monkeypatch, capsys):
    folder = make_pictures(tmp_path / "plain", index=False)
    (tmp_path / "a.csv").write_text("id;Prompt\n" + "".join(f"{i};{text}\n" for i, text in enumerate(PROMPTS)))
    (tmp_path / "b.json").write_text("".join(json.dumps({"tag": {"x": 1}, "prompt": text}) + "\n" for text in PROMPTS))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\r".join(["", *PROMPTS]).encode("utf-16"))))
    words = [folder, "--metrics", "vqa", "--vqa-model", blip, "--json"]
    found = [
        json.loads(images(*words, "--prompts", source, capsys=capsys)[1])["folders"][0]["scores"][0]["values"]
        for source in (tmp_path / "a.csv", tmp_path / "b.json", "-")
    ]
    assert found[0] == found[1] == found[2] and len(set(found[0].values())) == 4


def test_a_prompt_of_pictures_goes_to_its_picture_in_any_spelling(blip, pictures, tmp_path, capsys):
    words = [pictures, "--metrics", "vqa", "--vqa-model", blip, "--json"]
    more = tmp_path / "more.json"
    more.write_text(json.dumps([{"prompt": " a  blue\u00a0book", "phrases": ["a red cup", "a cup"]}]))
    plain, changed = (
        json.loads(images(*words, *extra, capsys=capsys)[1])["folders"][0]["scores"][0]["values"]
        for extra in ([], ["--prompts", more])
    )
    assert [file for file in plain if plain[file] != changed[file]] == ["000001.png"]


def test_folders_and_pictures_that_cannot_be_read_are_one_line(clip, pictures, tmp_path, capsys):
    def heard(*words):
        code, _, heard = images(*words, "--metrics", "clip-score", "--clip-model", clip, "--quiet", capsys=capsys)
        assert code == 1 and "Traceback" not in heard
        return heard.splitlines()[-1]

    assert heard(tmp_path / "none") == (
        f"secondcast: no folder {tmp_path}/none: expected the output of `secondcast generate`, or images "
        f"with --prompts FILE"
    )
    (tmp_path / "empty").mkdir()
    assert heard(tmp_path / "empty").startswith(f"secondcast: {tmp_path}/empty has no image: expected files such")
    file = pictures / "000002.png"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    assert heard(pictures).startswith(f"secondcast: {file} cannot be read as an image (")
    file.write_bytes(b"no picture")
    assert heard(pictures) == (
        f"secondcast: {file} cannot be read as an image (cannot identify image file 'it'): generate it again, or "
        f"remove it "
        f"from the folder and its index"
    )
    file.unlink()
    assert heard(pictures) == (
        f"secondcast: {pictures}/index.jsonl line 3 names 000002.png, which does not exist: rerun the "
        f"`secondcast generate` command, which makes missing images"
    )
    (pictures / "index.jsonl").write_text('{"number": 0}\n')
    assert heard(pictures).startswith(
        f"secondcast: {pictures}/index.jsonl line 1 was not written by `secondcast generate`: "
    )
    (pictures / "index.jsonl").write_text("")
    assert heard(pictures).startswith(f"secondcast: {pictures}/index.jsonl names no image: rerun the")


def test_prompts_that_a_metric_cannot_use_are_told_before_weights_are_looked_for(tmp_path, monkeypatch, capsys):
    looked_for, find = [], Weights.find
    monkeypatch.setattr(Weights, "find", lambda *given, **named: looked_for.append(given) or find(*given, **named))
    folder = make_pictures(tmp_path / "plain", index=False)
    code, said, heard = images(folder, "--clip-model", "none", capsys=capsys)
    assert code == 1 and said == "" and not looked_for
    assert heard.splitlines() == [
        f"no clip-score for {folder}: clip-score needs the prompts of the images, but {folder} has no index.jsonl: "
        f"give them with --prompts FILE",
        f"no vqa for {folder}: vqa needs the prompts of the images, but {folder} has no index.jsonl: give them with "
        f"--prompts FILE",
        f"no text for {folder}: text: no prompt of {folder} quotes one such as 'open': give --prompts JSONL with "
        f"`text`",
    ]
    # Where one folder can be scored they are.
    code, _, heard = images(
        folder, make_pictures(tmp_path / "i"), "--metrics", "vqa", "--vqa-model", "n", capsys=capsys
    )
    assert code == 1 and len(looked_for) == 1 and "no vqa: no weights 'n'" in heard


@pytest.mark.parametrize(
    ("words", "flag", "needed"),
    [
        (["--metrics", "text", "--reference", "r"], "reference", "fid in --metrics"),
        (["--metrics", "clip-score", "--vqa-model", "m"], "vqa-model", "vqa or compbench in --metrics"),
        (["--metrics", "vqa", "--clip-model", "m"], "clip-model", "clip-score or fid in --metrics"),
        (
            ["--metrics", "fid", "--reference", "r", "--clip-model", "m"],
            "clip-model",
            "clip-score in --metrics or --fid-features clip",
        ),
        (["--fid-features", "clip"], "fid-features", "fid in --metrics"),
        (
            ["--reference", "r", "--fid-features", "clip", "--fid-weights", "w"],
            "fid-weights",
            "--fid-features inception",
        ),
        (["--ocr", "tesseract", "--ocr-model", "m"], "ocr-model", "--ocr trocr"),
        (["--metrics", "vqa", "--ocr", "tesseract"], "ocr", "text in --metrics"),
    ],
)
def test_flags_of_what_is_not_asked_for_are_refused(words, flag, needed, capsys):
    code, _, heard = images("folder", *words, capsys=capsys)
    assert code == 1 and heard == (f"secondcast: --{flag} has no effect without {needed}: remove it, or give both\n")


def test_flags_can_stand_in_a_file(pictures, tmp_path, capsys):
    (tmp_path / "i.toml").write_text('metrics = "vqa"\nocr = "tesseract"\n')
    code, _, heard = images(pictures, "--config", tmp_path / "i.toml", capsys=capsys)
    assert code == 1 and heard.startswith("secondcast: --ocr has no effect without text in --metrics: ")


def test_unknown_metrics_are_refused(pictures, capsys):
    code, _, heard = images(pictures, "--metrics", "clip-score,lpips", capsys=capsys)
    assert code == 1
    assert heard == "secondcast: --metrics has 'lpips', expected some of clip-score,fid,vqa,text,compbench,pocket\n"


def test_the_help_has_an_example(capsys):
    code, said, _ = secondcast("evaluate", "images", "--help", capsys=capsys)
    assert code == 0 and "Example: secondcast evaluate images" in " ".join(said.split())


ASK = """
import sys
from secondcast.evaluation.image_metrics.weights import Weights
from secondcast.storage_schemas.errors import MissingWeightsError
for name in sys.argv[1].split():
    try:
        found = Weights.find(name, flag="--clip-model", model_type="clip")
        print(found.revision, *sorted(file.name for file in found.path.iterdir()))
    except MissingWeightsError as error:
        print(error)
"""


@pytest.mark.slow
def test_weights_of_the_hub_are_known_by_their_commit_and_found_again_offline(tmp_path):
    folder = make_clip(tmp_path / "clip")
    torch.save({}, folder / "pytorch_model.bin")
    with serve({NAME: Repository(folder=folder)}) as address:
        first, absent = run_apart(
            ASK, f"{NAME} someone/nothing", home=tmp_path / "home", HF_ENDPOINT=address
        ).splitlines()
    assert "model.safetensors" in first and "pytorch_model.bin" not in first
    assert len(first.split()[0]) == 40
    assert absent.startswith(
        "the weights someone/nothing are not available and could not be downloaded (RepositoryNotFoundErr"
    )
    again = run_apart(ASK, NAME, home=tmp_path / "home", HF_HUB_OFFLINE="1", HF_ENDPOINT="http://127.0.0.1:9")
    assert again.strip() == first

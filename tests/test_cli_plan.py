"""`understudy plan`: figures from configurations alone, one line where something is wrong."""

import json
import re
import shutil
from pathlib import Path

import pytest

from tests.cache_builder.building import build_cache
from tests.test_cli import understudy

CONFIGS = Path(__file__).parent / "cache_builder/flux_dev"
DEV = ["--teacher", "FLUX.1-dev"]


def test_a_build_of_flux_dev_is_planned_from_nothing(tmp_path, capsys):
    words = ["plan", "build", *DEV, "--count", 1000, "--gpu", "4090", "--disk", tmp_path, "--json"]
    code, said, _ = understudy(*words, capsys=capsys)
    facts = json.loads(said)
    assert code == 0 and facts["teacher"]["configs"].startswith("configurations of black-forest-labs/FLUX.1-dev that")
    assert facts["parameters"]["transformer"] == 11_901_408_320
    assert facts["disk"]["raw_bytes"] == pytest.approx(1000 * (22 * 128 + 616) * 1024, rel=0.01)
    # 20 steps of 15.07 TFLOP at 165.2 x 310 / 989 TFLOP/s.
    assert facts["compute"]["sample_hours"] == pytest.approx(1000 * 20 * 15.07 / 51.78 / 3600, rel=0.01)
    assert facts["verdicts"][0].startswith("fits: text stage: 10.0 GiB at batch 16, RTX 4090 has 24.0 GiB")
    assert re.fullmatch(r"does not fit: sample stage: 25\.2 GiB at .*; --batch-size \d+ fits", facts["verdicts"][1])
    assert facts["verdicts"][2].startswith(f"fits: the cache, 1.4 to 2.0 GiB (estimated), the disk of {tmp_path} has")


def test_the_table_of_a_build_says_whose_figures_these_are(capsys):
    code, said, _ = understudy("plan", "build", *DEV, "--count", 5, "--gpu", "rtx3060", capsys=capsys)
    assert code == 0 and "1 x RTX 3060 12GB, of 25.5 dense bf16" in said and "(not checked)" in said
    assert "estimated" in said and "calculated" in said and "11.901 B" in said
    assert "before the first sample: take a larger card" in said


def test_a_folder_of_configurations_without_weights_suffices(tmp_path, prompt_file, capsys):
    shutil.copytree(CONFIGS, tmp_path / "flux")
    (tmp_path / "flux/tokenizer_2").mkdir()
    (tmp_path / "flux/tokenizer_2/tokenizer_config.json").write_text('{"model_max_length": 512}')
    words = ["plan", "build", "--teacher", tmp_path / "flux", "--prompts", prompt_file, "--limit", 4, "--replicas", 3]
    code, said, _ = understudy(*words, "--tflops", 100, "--gpus", 2, "--json", capsys=capsys)
    facts = json.loads(said)
    assert code == 0 and facts["cache"]["trajectories"] == 12 and facts["cache"]["prompts"] == 4
    assert facts["compute"]["sample_hours"] == pytest.approx(12 * 20 * 15.07 / 200 / 3600, rel=0.01)
    assert facts["teacher"]["configs"] == f"configuration files in {tmp_path}/flux"


def test_training_is_planned_beside_the_papers_recipe(capsys):
    words = ["plan", "train", *DEV, "--student", "base", "--batch-size", 4, "--steps", 50_000, "--gpu", "h100"]
    code, said, _ = understudy(*words, "--json", capsys=capsys)
    facts = json.loads(said)
    now, later = facts["ways"]["this_version"], facts["ways"]["with_checkpointing"]
    assert code == 0 and now["vision_hours"] == pytest.approx(4 * 50_000 * 31.4 / 310 / 3600, rel=0.02)
    assert now["paper_recipe_hours"] == pytest.approx(32 * 320_000 * 31.4 / 310 / 3600, rel=0.02)
    assert later["vision_hours"] / now["vision_hours"] == pytest.approx(46.5 / 31.4, rel=0.01)
    # 2-4 MB/s on an H100 at batch 4.
    assert 2e6 < now["used_bytes_per_second"] < 4e6 < now["read_bytes_per_second"]
    assert facts["verdicts"] == [
        "fits: training (this version): 44.9 GiB at batch 4, H100 SXM has 79.2 GiB",
    ]
    code, said, _ = understudy(*words, "--checkpointing", capsys=capsys)
    assert code == 0 and "fits: training (with checkpointing, not in this version yet): 27.6 GiB at batch 4" in said
    assert "of the vision loss at batch 4" in said and "GPU memory" in said


def test_a_warm_up_alone_needs_no_room_for_the_backbone(capsys):
    words = ["plan", "train", *DEV, "--student", "small", "--steps", 0, "--warmup-steps", 9, "--gpu", "3060", "--json"]
    facts = json.loads(understudy(*words, capsys=capsys)[1])
    memory = facts["ways"]["this_version"]["gpu_memory"]
    assert memory["weights_bytes"] == 0 and facts["verdicts"][0].startswith("fits: ")


def test_training_from_a_cache_goes_by_its_manifest(tmp_path, dev_teacher, prompt_file, capsys):
    build_cache(tmp_path / "c", dev_teacher, prompt_file, dtype="float32")
    words = ["plan", "train", "--cache", tmp_path / "c", "--student", "small", "--gpu", "a100"]
    code, said, _ = understudy(*words, capsys=capsys)
    assert code == 0 and f"the manifest of {tmp_path}/c" in " ".join(said.split())
    assert "the rate of A100 80GB is that of bfloat16; give --tflops X for float32" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["build", *DEV], r"plan build needs one of --prompts FILE and --count N$"),
        (["build", *DEV, "--count", "5", "--prompts", "p.txt"], r"plan build needs one of --prompts FILE and"),
        (["build", *DEV, "--count", "5", "--gpu", "voodoo"], r"--gpu 'voodoo' is not known, expected one of RTX 3060"),
        (["build", *DEV, "--count", "5", "--tflops", "0"], r"--tflops is 0.0, expected the TFLOP/s that are reached"),
        (["build", *DEV, "--count", "5", "--resolution", "500"], r"height is 500, expected a multiple of 16"),
        (["build", *DEV, "--count", "5", "--steps", "0"], r"--steps: "),
        (["build", "--teacher", "a/b", "--count", "5"], r"no teacher 'a/b' to plan for: expected a folder"),
        (["train", "--student", "small"], r"plan train needs one of --cache .* and --teacher"),
        (["train", *DEV, "--student", "small", "--steps", "0"], r"--steps 0 and --warmup-steps 0: nothing would be"),
        (["train", *DEV, "--student", "./nix"], r"no student './nix': expected a folder"),
        (["train", "--cache", "nix", "--student", "small"], r"nix is not a folder"),
    ],
)
def test_what_cannot_be_planned_is_one_clear_line(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("a red circle\n")
    code, _, heard = understudy("plan", *words, capsys=capsys)
    last = heard.strip().splitlines()[-1]
    assert code == 1 and last.startswith("understudy: ") and re.search(message, last), last
    assert "Traceback" not in heard


def test_a_build_that_no_disk_could_hold_is_refused_before_the_cache_is_there(tmp_path, capsys):
    (tmp_path / "p.txt").write_text("a red circle\n")
    words = ["build", tmp_path / "c", "--teacher", "pocket", "--prompts", tmp_path / "p.txt"]
    code, _, heard = understudy(*words, "--replicas", 10**12, capsys=capsys)
    assert code == 1 and f"{tmp_path}/c needs " in heard and "GiB free: a build that fills the disk stops" in heard
    assert not (tmp_path / "c").exists()


def test_a_forced_build_begins_all_the_same(tmp_path, capsys):
    (tmp_path / "p.txt").write_text("a red circle\n")
    words = ["build", tmp_path / "c", "--teacher", "pocket", "--prompts", tmp_path / "p.txt", "--steps", 2]
    assert understudy(*words, "--force", capsys=capsys)[0] == 0


@pytest.mark.parametrize("words", [["build"], ["train"]])
def test_help_has_an_example(words, capsys):
    code, said, _ = understudy("plan", *words, "--help", capsys=capsys)
    assert code == 0 and f"Example: understudy plan {words[0]}" in " ".join(said.split())

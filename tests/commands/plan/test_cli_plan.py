"""`secondcast plan`: figures from configurations alone, one line where something is wrong."""

import json
import re
import shutil
from pathlib import Path

import pytest

from tests.cache_builder.building import build_cache
from tests.commands.test_cli import secondcast

CONFIGS = Path(__file__).resolve().parents[2] / "cache_builder/flux_dev"
DEV = ["--teacher", "FLUX.1-dev"]


def unwrapped(said: str) -> str:
    """What a plan prints, without its line breaks."""
    return " ".join(said.split())


def test_a_build_of_flux_dev_is_planned_from_nothing(tmp_path, capsys):
    words = ["plan", "build", *DEV, "--num-prompts", 1000, "--gpu", "4090", "--disk", tmp_path, "--json"]
    code, said, _ = secondcast(*words, capsys=capsys)
    facts = json.loads(said)
    assert code == 0 and facts["teacher"]["configs"].startswith(
        "configuration files of black-forest-labs/FLUX.1-dev in"
    )
    assert facts["parameters"]["transformer"] == 11_901_408_320
    assert facts["disk"]["raw_bytes"] == pytest.approx(1000 * (22 * 128 + 616) * 1024, rel=0.01)
    # 20 steps of 15.07 TFLOP.
    rate = facts["gpu"]["achieved_flop_per_second"] / 1e12
    assert facts["compute"]["sample_hours"] == pytest.approx(1000 * 20 * 15.07 / rate / 3600, rel=0.01)
    assert facts["verdicts"][0].startswith(
        "fits: text stage: 10.0 GiB, 11.0 with a margin, at batch 16, RTX 4090 has 23.6 GiB"
    )
    assert re.fullmatch(
        r"does not fit: sample stage: 25\.1 GiB, 26\.6 with a margin, at batch 16, .*; it needs 24\.7 GiB before the "
        r"first sample: --max-gpu-memory 23\.64GiB fits with the exact weights: .*",
        facts["verdicts"][1],
    )
    assert facts["verdicts"][2].startswith(f"fits: the cache, 1.4 to 2.0 GiB (estimated), the disk of {tmp_path} has")


def test_a_build_that_does_not_fit_is_planned_with_an_exact_placement(capsys):
    _, said, _ = secondcast("plan", "build", "--teacher", "FLUX.1-dev", "--num-prompts", "9", "--gpu", "3060",
                            capsys=capsys)  # fmt: skip
    assert re.search(
        r"before the first sample: --max-gpu-memory 12GiB fits with the exact weights: --modulation precomputed "
        r"--gpu-blocks \d+, 1[01]\.\d GiB by calculation \(weights [\d.]+ GiB, a batch of 16 [\d.]+ GiB\), [\d.]+ GiB "
        r"of pinned host memory",
        unwrapped(said),
    )


def test_sampling_is_planned_with_the_placement_that_fits(capsys):
    words = ["plan", "generate", *DEV, "--resolution", 1024, "--steps", 28, "--batch-size", 1]
    code, said, _ = secondcast(*words, "--gpu", "4090", "--json", capsys=capsys)
    facts = json.loads(said)
    assert code == 0 and facts["fits"][0]["fits"] and facts["verdicts"][0].startswith("fits: sampling: ")
    assert 16.3 < facts["gpu_memory"]["weights_bytes"] / 2**30 < 17.5
    said = unwrapped(secondcast(*words, "--gpu", "4070", capsys=capsys)[1])
    assert re.search(
        r"does not fit: sampling: [\d.]+ GiB, [\d.]+ with a margin, at batch 1, RTX 4070 has 12\.0 GiB; "
        r"--max-gpu-memory 12GiB fits: --modulation precomputed --gpu-blocks \d+, ",
        said,
    )
    one = facts["compute"]["seconds_per_image"]
    said = secondcast(*words, "--gpu", "4090", "--samples-per-prompt", 10, "--json", capsys=capsys)[1]
    compute = json.loads(said)["compute"]
    assert (compute["seconds_per_image"], compute["seconds_per_prompt"]) == (one, pytest.approx(10 * one))
    said = unwrapped(secondcast(*words, "--gpu", "4090", "--samples-per-prompt", 10, capsys=capsys)[1])
    assert "s per prompt" in said and f"{10 * one:,.1f}" in said
    said = secondcast(*words, "--batch-size", "64", "--gpu", "4060", capsys=capsys)[1]
    assert "give a smaller --batch-size, smaller images, --quantize nf4, or a larger GPU" in unwrapped(said)


def test_an_evaluation_is_planned_by_its_calls_of_the_transformer(capsys):
    words = ["plan", "evaluate", *DEV, "--num-trajectories", 10, "--timesteps", "0,5", "--closed-loop", 4]
    code, said, _ = secondcast(*words, "--random-baseline", "--gpu", "4090", "--json", capsys=capsys)
    facts = json.loads(said)
    assert code == 0 and facts["fits"][0]["fits"] and facts["verdicts"][0].startswith("fits: evaluation: ")
    # Student and recorded embedding in the open loop; student, teacher and untrained student in the closed one.
    calls = (facts["compute"]["open_loop_calls"], facts["compute"]["closed_loop_calls"])
    assert calls == (2 * 10 * 2, 3 * 4 * 20)
    assert facts["compute"]["flop"] == pytest.approx(sum(calls) * 15.07e12, rel=0.01)
    rate = facts["gpu"]["achieved_flop_per_second"]
    assert facts["compute"]["hours"] == pytest.approx(facts["compute"]["flop"] / rate / 3600)
    said = " ".join(secondcast(*words, "--max-gpu-memory", "12GiB", capsys=capsys)[1].split())
    assert "10 trajectories of 512 x 512 px at 2 steps; 4 of them sampled again" in said
    assert "with a margin, at batch 8, the limit is 12.0 GiB; --max-gpu-memory 12GiB fits: " in said


@pytest.mark.parametrize(
    "words", [["plan", "evaluate", *DEV], ["plan", "train", *DEV, "--student", "base", "--batch-size", 4, "--steps", 5]]
)
def test_a_limit_above_the_memory_of_the_named_gpu_is_refused(words, capsys):
    code, _, heard = secondcast(*words, "--gpu", "4070", "--max-gpu-memory", "16GiB", capsys=capsys)
    assert (code, heard) == (
        1,
        "secondcast: --max-gpu-memory is 16GiB, but --gpu RTX 4070 has 12 GiB: give no more than that, or remove "
        "the option\n",
    )
    assert secondcast(*words, "--gpu", "4070", "--max-gpu-memory", "12GiB", capsys=capsys)[0] == 0


def test_a_build_with_quantized_weights_needs_less(capsys):
    words = ["plan", "build", *DEV, "--num-prompts", 5, "--batch-size", 1, "--json"]
    exact, eight, four = (
        json.loads(secondcast(*words, "--quantize", kind, capsys=capsys)[1])["gpu_memory"]["sample_stage"]
        for kind in ("none", "int8", "nf4")
    )
    assert exact["weights_bytes"] == 2 * 11_901_408_320
    # A block's linears unpacked; the modulation's stay as they are.
    assert eight["weights_bytes"] / 2**30 == pytest.approx(8.03 + 6.05 + 0.42, abs=0.1)
    assert four["weights_bytes"] / 2**30 == pytest.approx(4.52 + 6.05 + 0.09, abs=0.1)


def test_the_table_of_a_build_says_whose_figures_these_are(capsys):
    code, said, _ = secondcast("plan", "build", *DEV, "--num-prompts", 5, "--gpu", "rtx3060", capsys=capsys)
    assert code == 0 and max(map(len, said.splitlines())) <= 80
    said = unwrapped(said)
    assert "1 x RTX 3060 12GB; matrix products at 88 % of 25.5 dense bf16 TFLOP/s" in said
    assert "whitepaper (2021), not checked)" in said
    assert "estimated" in said and "calculated" in said and "11.901 B" in said
    assert "before the first sample: --max-gpu-memory 12GiB fits with the exact weights: " in said


def test_a_folder_of_configurations_without_weights_suffices(tmp_path, prompt_file, capsys):
    shutil.copytree(CONFIGS, tmp_path / "flux")
    (tmp_path / "flux/tokenizer_2").mkdir()
    (tmp_path / "flux/tokenizer_2/tokenizer_config.json").write_text('{"model_max_length": 512}')
    words = [
        "plan",
        "build",
        "--teacher",
        tmp_path / "flux",
        "--prompts",
        prompt_file,
        "--limit",
        4,
        "--samples-per-prompt",
        3,
    ]
    code, said, _ = secondcast(*words, "--tflops", 100, "--gpus", 2, "--json", capsys=capsys)
    facts = json.loads(said)
    assert code == 0 and facts["cache"]["trajectories"] == 12 and facts["cache"]["prompts"] == 4
    assert facts["compute"]["sample_hours"] == pytest.approx(12 * 20 * 15.07 / 200 / 3600, rel=0.01)
    assert facts["teacher"]["configs"] == f"configuration files in {tmp_path}/flux"


def test_training_is_planned_beside_the_papers_recipe(capsys):
    words = ["plan", "train", *DEV, "--student", "base", "--batch-size", 4, "--steps", 50_000, "--gpu", "h100"]
    code, said, _ = secondcast(*words, "--json", capsys=capsys)
    facts = json.loads(said)
    now = facts["ways"]["as_asked"]
    unnamed = json.loads(secondcast(*words[:-2], "--tflops", 310, "--json", capsys=capsys)[1])
    later = unnamed["ways"]["activation_checkpointing_1"]
    assert set(facts["ways"]) == {"as_asked"} and unnamed["verdicts"] == []
    rate = facts["gpu"]["achieved_flop_per_second"] / 1e12
    assert code == 0 and now["vision_hours"] == pytest.approx(4 * 50_000 * 31.4 / rate / 3600, rel=0.02)
    assert now["paper_recipe_hours"] == pytest.approx(32 * 320_000 * 31.4 / rate / 3600, rel=0.02)
    assert 270 < rate < 330
    assert later["vision_hours"] / unnamed["ways"]["as_asked"]["vision_hours"] == pytest.approx(46.5 / 31.4, rel=0.01)
    # 2-4 MB/s on an H100 at batch 4.
    assert 2e6 < now["used_bytes_per_second"] < 4e6 < now["read_bytes_per_second"]
    assert facts["verdicts"] == [
        "fits: training: 36.1 GiB, 38.1 with a margin, at 4 rows at once, H100 SXM has 79.2 GiB",
    ]
    code, said, _ = secondcast(*words, "--activation-checkpointing", 1, capsys=capsys)
    assert code == 0 and "fits: training: 21.5 GiB, 22.9 with a margin, at 4 rows at once" in unwrapped(said)
    assert "of the vision loss at batch 4" in unwrapped(said) and "GPU memory" in said


RECIPES = Path(__file__).resolve().parents[3] / "recipes"
# TFLOP of a row at 512 px and at 1024 px, student apart.
ROW_512, ROW_1024 = 31.36, 150.3


@pytest.mark.thorough
def test_the_papers_recipe_is_planned_by_the_sizes_of_its_caches(capsys):
    words = ["plan", "train", "--config", RECIPES / "paper.toml", *DEV, "--gpu", "4090"]
    sizes = ["--resolution", 512, "--resolution", "commontext=1024"]
    code, said, _ = secondcast(*words, *sizes, "--json", capsys=capsys)
    facts = json.loads(said)
    stages = facts["ways"]["as_asked"]["stages"]
    assert code == 0 and [stage["caches"] for stage in stages] == [
        {"compbench": 512}, {"commontext": 1024}, {"compbench": 512, "commontext": 1024, "laion": 512},
    ]  # fmt: skip
    rate = facts["gpu"]["achieved_flop_per_second"] / 1e12
    # Caches to come are equally large: ten, one and one of twelve rows.
    for stage, row in zip(stages, (ROW_512, ROW_1024, (11 * ROW_512 + ROW_1024) / 12), strict=True):
        assert stage["flop_per_step"] == pytest.approx(32 * row * 1e12, rel=0.01)
        assert stage["seconds_per_step"] == pytest.approx(32 * row / rate, rel=0.01)
        assert stage["hours"] == pytest.approx(stage["steps"] * stage["seconds_per_step"] / 3600)
    assert facts["ways"]["as_asked"]["hours"] == pytest.approx(sum(stage["hours"] for stage in stages))
    # All at 512 px: 36 days.
    assert facts["ways"]["as_asked"]["paper_recipe_hours"] / 24 == pytest.approx(36, abs=1)
    assert facts["student"]["source"] == "google-t5/t5-base"


SHARED_BUDGET = """
student = "google-t5/t5-base"
student-dtype = "bfloat16-autocast"
backbone-dtype = "bfloat16"
activation-checkpointing = 1

[[stage]]
name = "pretrain"
loss = "context"
budget-share = 0.1
batch-size = 64
grad-accum-steps = 4

[[stage]]
name = "vision"
budget-share = 0.9
batch-size = 32
grad-accum-steps = 8
"""


@pytest.fixture
def shared_budget(tmp_path):
    (tmp_path / "shared.toml").write_text(SHARED_BUDGET)
    return tmp_path / "shared.toml"


@pytest.mark.thorough
def test_the_road_of_a_day_takes_a_day_and_says_what_is_known(capsys):
    counts = [word for name in ("text=100000", "256=20000", "512=10000") for word in ("--num-prompts", f"flux-{name}")]
    words = ["plan", "recipe", RECIPES / "flux-h100-day.toml", *counts, "--build-gpu", "h100", "--train-gpu", "h100"]
    facts = json.loads(secondcast(*words, "--json", capsys=capsys)[1])
    run, both = facts["train"]["ways"]["as_asked"]["hours"], facts["both_phases"]
    assert both["hours"] == pytest.approx(run + both["build_hours"]) and both["hours"] < 24
    text = facts["build"]["flux-text"]
    assert text["cache"]["trajectories"] == 0 and set(text["gpu_memory"]) == {"text_stage"}
    # T5-XXL's 4.7 billion parameters over 77 tokens, forward.
    assert text["compute"]["text_flop_per_prompt"] == pytest.approx(2 * 4.63e9 * 77, rel=0.02)
    (embedding,) = [one for one in text["arrays"] if one["name"] == "encoder_hidden_states"]
    assert embedding["row_bytes"] == 77 * 4096 * 2
    said = unwrapped(secondcast(*words, capsys=capsys)[1])
    assert "evidence for the student's quality: unknown on FLUX: no run is recorded" in said
    assert said.startswith(
        f"fits: {both['hours']:.1f} h in all (builds {both['build_hours']:.1f} h on one H100 SXM, training {run:.1f} h "
        f"on one H100 SXM), about {2.5 * both['hours']:.0f} USD, "
    )


def test_a_budget_is_told_in_steps_of_each_stage_that_shares_it(shared_budget, capsys):
    words = ["plan", "train", "--config", shared_budget, *DEV, "--time-budget", "72h"]
    facts = json.loads(secondcast(*words, "--gpu", "4090", "--json", capsys=capsys)[1])
    for way in facts["ways"].values():
        pretrain, vision = way["stages"]
        assert [pretrain["hours"], vision["hours"], way["hours"]] == pytest.approx([7.2, 64.8, 72])
        for stage in (pretrain, vision):
            assert stage["steps"] == int(stage["hours"] * 3600 / stage["seconds_per_step"])
        # No transformer, and forward and backward of 130 million parameters over 77 tokens.
        assert pretrain["flop_per_step"] < 64 * 6 * 140e6 * 77
    # Of 32 rows, 4 at once.
    assert facts["ways"]["as_asked"]["gpu_memory"]["batch_size"] == 4
    code, said, _ = secondcast(*words, "--gpu", "4090", capsys=capsys)
    text = unwrapped(said)
    assert code == 0 and f"90 % of 72 h, about {facts['ways']['as_asked']['stages'][1]['steps']:,} steps" in text
    assert "the steps of stages that share the budget of 72 h are estimates: train measures the time of a step" in text
    assert (
        "steps without the transformer take longer than estimated: they are too small for the GPU's full rate" in text
    )
    assert "1,261 (53 days)" in said
    assert "fits: training: 21.9 GiB, 23.3 with a margin, at 4 rows at once, RTX 4090 has 23.6 GiB" in text


@pytest.mark.slow
def test_without_a_card_a_share_of_the_budget_is_hours_and_no_steps(dev_teacher, shared_budget, capsys):
    words = [
        "plan",
        "train",
        "--config",
        shared_budget,
        "--teacher",
        dev_teacher,
        "--time-budget",
        "72h",
    ]
    words += ["--student", dev_teacher / "text_encoder_2"]
    facts = json.loads(secondcast(*words, "--json", capsys=capsys)[1])
    stages = facts["ways"]["as_asked"]["stages"]
    assert [(stage["steps"], stage["seconds_per_step"]) for stage in stages] == [(None, None)] * 2
    assert [stage["hours"] for stage in stages] == pytest.approx([7.2, 64.8])


@pytest.mark.thorough
def test_what_is_divided_or_shared_takes_less(dev_teacher, capsys):
    def planned(*more):
        words = ["plan", "train", "--teacher", dev_teacher, "--student", dev_teacher / "text_encoder_2", "--json"]
        return json.loads(secondcast(*words, *more, capsys=capsys)[1])

    whole, divided = (planned("--batch-size", 8, *more) for more in ([], ["--grad-accum-steps", 4]))
    one, other = (facts["ways"]["as_asked"] for facts in (whole, divided))
    assert one["stages"][0]["flop_per_step"] == other["stages"][0]["flop_per_step"]
    assert one["gpu_memory"]["activations_bytes"] == 4 * other["gpu_memory"]["activations_bytes"]
    shared = planned("--batch-size", 8, "--timesteps-per-sample", 4)["ways"]["as_asked"]
    assert shared["stages"][0]["flop_per_step"] < one["stages"][0]["flop_per_step"]
    assert shared["read_bytes_per_step"] == one["read_bytes_per_step"] / 4
    pretrain_stages = planned("--pretrain-steps", 5, "--pretrain-loss", "context")["ways"]["as_asked"]["stages"]
    assert [(stage["loss"], stage["steps"]) for stage in pretrain_stages] == [("context", 5), ("vision", 1000)]
    embedding = planned("--loss", "embedding", "--batch-size", 32)
    assert embedding["ways"]["as_asked"]["gpu_memory"]["weights_bytes"] == 0
    # The linear on both embeddings, and its gradient: three products of 12 x 24 x 32.
    added = pretrain_stages[0]["flop_per_step"] - embedding["ways"]["as_asked"]["stages"][0]["flop_per_step"]
    assert added == pytest.approx(32 * 3 * 2 * 12 * 24 * 32, rel=1e-3)


RECIPE = """
student = "small"
[[stage]]
steps = 3
caches = {here = 1, signs = 1}
"""


@pytest.mark.slow
def test_caches_that_are_there_and_caches_to_come_are_planned_together(tmp_path, dev_teacher, prompt_file, capsys):
    build_cache(tmp_path / "c", dev_teacher, prompt_file)
    (tmp_path / "r.toml").write_text(RECIPE)
    words = ["plan", "train", "--config", tmp_path / "r.toml", "--cache", f"here={tmp_path}/c"]
    words += ["--student", dev_teacher / "text_encoder_2"]
    code, said, _ = secondcast(*words, "--teacher", dev_teacher, "--resolution", 24, "--json", capsys=capsys)
    facts = json.loads(said)
    (stage,) = facts["ways"]["as_asked"]["stages"]
    assert code == 0 and stage["caches"] == {"here": 16, "signs": 24} and stage["hours"] is None
    code, _, heard = secondcast(*words, capsys=capsys)
    assert code == 1 and heard == (
        "secondcast: the recipe uses the cache 'signs', which is not given: give --cache signs=FOLDER, or --teacher "
        "for a planned one\n"
    )
    code, _, heard = secondcast(*words, "--cache", f"signs={tmp_path}/c", "--teacher", dev_teacher, capsys=capsys)
    assert code == 1 and heard == (
        f"secondcast: --teacher is {dev_teacher}, but all caches of the run are given, here, signs: plan train needs "
        f"--cache (an existing cache) or --teacher (for a planned one)\n"
    )
    code, _, heard = secondcast(*words, "--teacher", dev_teacher, "--resolution", "here=24", capsys=capsys)
    assert code == 1 and heard == (
        "secondcast: --resolution here=24 names the cache 'here', expected a planned one: signs\n"
    )


def test_a_warm_up_alone_needs_no_room_for_the_backbone(capsys):
    words = [
        "plan",
        "train",
        *DEV,
        "--student",
        "small",
        "--steps",
        0,
        "--pretrain-steps",
        9,
        "--gpu",
        "3060",
        "--json",
    ]
    facts = json.loads(secondcast(*words, capsys=capsys)[1])
    memory = facts["ways"]["as_asked"]["gpu_memory"]
    assert memory["weights_bytes"] == 0 and facts["verdicts"][0].startswith("fits: ")


@pytest.mark.slow
def test_training_from_a_cache_goes_by_its_manifest(tmp_path, dev_teacher, prompt_file, capsys):
    build_cache(tmp_path / "c", dev_teacher, prompt_file, dtype="float32")
    words = ["plan", "train", "--cache", tmp_path / "c", "--student", "small", "--gpu", "a100"]
    code, said, _ = secondcast(*words, capsys=capsys)
    assert code == 0 and f"the manifest of {tmp_path}/c" in unwrapped(said)
    assert "the rate of A100 80GB is for bfloat16; give --tflops X for float32" in unwrapped(said)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["build", *DEV], r"plan build needs one of --prompts FILE and --num-prompts N$"),
        (["build", *DEV, "--num-prompts", "5", "--prompts", "p.txt"], r"plan build needs one of --prompts FILE and"),
        (
            ["build", *DEV, "--num-prompts", "5", "--gpu", "voodoo"],
            r"--gpu 'voodoo' is unknown, expected one of RTX 3060",
        ),
        (
            ["build", *DEV, "--num-prompts", "5", "--tflops", "0"],
            r"--tflops is 0.0, expected the achieved TFLOP/s",
        ),
        (["build", *DEV, "--num-prompts", "5", "--resolution", "500"], r"height is 500, expected a multiple of 16"),
        (["build", *DEV, "--num-prompts", "5", "--steps", "0"], r"--steps is 0, expected at least 1"),
        (["build", "--teacher", "a/b", "--num-prompts", "5"], r"no teacher 'a/b' to plan for, expected a folder"),
        (["train", "--student", "small"], r"plan train needs one of --cache .* and --teacher"),
        (["train", *DEV, "--student", "small", "--steps", "0"], r"steps and pretrain-steps are both 0, expected at"),
        (["train", *DEV], r"no student is given: give --student, such as google-t5/t5-base .* Qwen/Qwen3-0.6B$"),
        (
            ["train", *DEV, "--student", "base", "--time-budget", "5h"],
            r"--time-budget is 5h without a recipe, whose stages",
        ),
        (["train", *DEV, "--student", "base", "--resolution", "x=y"], r"--resolution is 'x=y', expected pixels, or"),
        (["train", *DEV, "--config", "r.toml"], r"no file r\.toml for --config: expected lines such"),
        (["train", *DEV, "--config", str(RECIPES / "flux-24gb.toml")], r"toml: stage pretrain has a budget-share"),
        (["train", *DEV, "--config", str(RECIPES / "pocket.toml"), "--steps", "9"], r"--steps is given beside --con"),
        (["train", *DEV, "--student", "./nix"], r"no student './nix': there is no such folder"),
        (["train", "--cache", "nix", "--student", "small"], r"nix is not a folder"),
    ],
)
def test_what_cannot_be_planned_is_one_clear_line(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("a red circle\n")
    code, _, heard = secondcast("plan", *words, capsys=capsys)
    last = heard.strip().splitlines()[-1]
    assert code == 1 and last.startswith("secondcast: ") and re.search(message, last), last
    assert "Traceback" not in heard


@pytest.mark.parametrize("place", ["/nonexistent", "/nonexistent/cache", "s3://bucket/cache"])
def test_a_disk_that_is_not_here_is_not_the_root_disk(place, capsys):
    code, said, heard = secondcast("plan", "build", *DEV, "--num-prompts", 10, "--disk", place, capsys=capsys)
    assert (code, said) == (1, "") and heard == (
        f"secondcast: --disk {place} does not exist: expected an existing folder on the disk of the planned cache\n"
    )


def test_a_build_that_no_disk_could_hold_is_refused_before_the_cache_is_there(tmp_path, capsys):
    (tmp_path / "p.txt").write_text("a red circle\n")
    words = ["build", tmp_path / "c", "--teacher", "pocket", "--prompts", tmp_path / "p.txt"]
    code, _, heard = secondcast(*words, "--samples-per-prompt", 10**12, capsys=capsys)
    assert code == 1 and f"{tmp_path}/c needs " in heard and "GiB free: a build stops when the disk is full" in heard
    assert not (tmp_path / "c").exists()


def test_a_forced_build_begins_all_the_same(tmp_path, capsys):
    (tmp_path / "p.txt").write_text("a red circle\n")
    words = ["build", tmp_path / "c", "--teacher", "pocket", "--prompts", tmp_path / "p.txt", "--steps", 2]
    assert secondcast(*words, "--skip-disk-check", capsys=capsys)[0] == 0


def test_the_depth_loss_is_planned_by_its_blocks(capsys):
    words = ["plan", "train", *DEV, "--student", "base", "--batch-size", 4, "--loss", "depth", "--gpu", "4060"]
    one, four = (
        json.loads(secondcast(*words, "--depth-blocks", n, "--json", capsys=capsys)[1])["ways"]["as_asked"]
        for n in (1, 4)
    )
    assert one["stages"][0]["flop_per_step"] / 4e12 == pytest.approx(0.81, rel=0.01)
    assert four["stages"][0]["flop_per_step"] / 4e12 == pytest.approx(3.26, rel=0.01)
    assert one["gpu_memory"]["weights_bytes"] < 2**29 < 1.9e9 / 2 < four["gpu_memory"]["weights_bytes"] < 1.9e9
    # 31.4 TFLOP, as without the option; no stage has that loss.
    assert one["flop_per_sample"] / 1e12 == pytest.approx(31.4, rel=0.01) and one["vision_hours"] == 0
    assert one["pretrain_hours"] == one["hours"] == one["stages"][0]["hours"] > 0
    # Of a row: a latent of 128 KiB and an embedding of 616 KiB.
    assert one["used_bytes_per_step"] == 4 * (128 + 616) * 1024
    code, said, _ = secondcast(*words, capsys=capsys)
    assert code == 0 and "1,000 steps of the depth loss at batch 4" in unwrapped(said)
    assert "fits: training: 4.2 GiB" in unwrapped(said)
    code, _, heard = secondcast(*words, "--depth-blocks", 58, capsys=capsys)
    assert code == 1 and heard == (
        "secondcast: --depth-blocks is 58, expected 1 to 57, the number of blocks of this transformer: use 57\n"
    )

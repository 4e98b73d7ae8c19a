"""`--max-gpu-memory`: what is said, what is trained, and which flag helps a run that ran out of GPU memory."""

import json
import re

import pytest
import torch

from secondcast.api.fitting import stated_options
from secondcast.models.cost.gpu_memory import CUDA_BYTES
from secondcast.models.memory.options import size_bytes
from secondcast.storage_schemas.errors import SettingsError
from secondcast.storage_schemas.reader import Cache
from secondcast.trainer.cost.stage_cost import Costs, costs_of
from secondcast.trainer.recipe import read_recipe
from secondcast.trainer.run.folder import CONFIG_FILE
from secondcast.trainer.settings import TrainFlags, TrainSettings
from tests.commands.test_cli import secondcast
from tests.trainer.conftest import cache_folder, t5_config

__all__ = ["cache_folder", "t5_config"]

DEV = ["plan", "train", "--teacher", "FLUX.1-dev", "--student", "base", "--batch-size", 4]


@pytest.fixture
def words(tmp_path, cache_folder, dev_teacher, t5_config):
    more = ["--student", t5_config, "--backbone", dev_teacher, "--steps", 2, "--batch-size", 4]
    return ["train", tmp_path / "run", "--cache", cache_folder, *more]


@pytest.fixture
def costs(cache_folder, t5_config) -> Costs:
    cache = Cache.open(cache_folder)
    return costs_of({cache_folder.name: cache.manifest}, str(t5_config))


def asked(**options) -> TrainSettings:
    return TrainFlags.from_flags(student="any", steps=2, batch_size=4, **options).settings()


def size(value: float) -> str:
    return f"{value / 2**20:.3f}MiB"


def recorded(run) -> dict:
    return json.loads((run / CONFIG_FILE).read_bytes())["settings"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("16GiB", 2**34), ("11.5 GiB", 11.5 * 2**30), ("16GB", 16e9), ("8g", 2**33), ("512MiB", 2**29)],
)
def test_sizes_are_read_in_the_units_that_they_name(text, expected):
    assert size_bytes(text) == expected


@pytest.mark.parametrize("text", ["16", "0GiB", "a lot", "-3GiB", "16TiB", ""])
def test_another_size_is_refused(text):
    with pytest.raises(SettingsError) as raised:
        size_bytes(text)
    assert str(raised.value) == (
        f"--max-gpu-memory is {text!r}, expected a size such as 16GiB or 11.5GiB, or auto for the free memory"
    )


@pytest.mark.thorough
def test_a_run_is_made_to_fit_and_says_by_what_and_why(tmp_path, words, costs, capsys):
    least = costs.memory(asked(activation_checkpointing=1))
    room = least.needed_bytes + 0.1 * (least.total_bytes - CUDA_BYTES)
    code, _, heard = secondcast(*words, "--max-gpu-memory", size(room), capsys=capsys)
    heard = " ".join(heard.split())
    assert code == 0 and re.search(
        r"to fit into 1\.6 GiB: --activation-checkpointing \d+, 1\.0 GiB by calculation \(w", heard
    )
    every = recorded(tmp_path / "run")["activation_checkpointing"]
    assert every > 0 and costs.memory(asked(activation_checkpointing=every)).needed_bytes <= room
    # Given again with less memory than its parts of a batch need: those it keeps.
    code, _, heard = secondcast(*words, "--max-gpu-memory", "1MiB", capsys=capsys)
    last = heard.strip().splitlines()[-1]
    assert code == 1 and last.startswith(
        f"secondcast: {tmp_path}/run has started and keeps its --grad-accum-steps and --quantize; with "
        f"these nothing fits into 0.0 GiB: the exact weights need 1.6 GiB or more; "
    )
    assert last.endswith("or a larger GPU; or use a new run folder")
    code, _, heard = secondcast(*words, "--max-gpu-memory", "80GiB", capsys=capsys)
    assert code == 0 and "to fit into 80.0 GiB: no change, 1.0 GiB by calculation" in " ".join(heard.split())


@pytest.mark.thorough
def test_what_was_given_beside_fit_stays(tmp_path, words, costs, capsys):
    code, _, heard = secondcast(*words, "--max-gpu-memory", "80GiB", "--activation-checkpointing", 1, capsys=capsys)
    assert code == 0 and recorded(tmp_path / "run")["activation_checkpointing"] == 1
    words[1] = tmp_path / "other"
    held = ["--activation-checkpointing", 0, "--grad-accum-steps", 1, "--quantize", "none"]
    code, _, heard = secondcast(*words, *held, "--max-gpu-memory", "1MiB", capsys=capsys)
    text = " ".join(heard.split())
    # No other weights, and nothing of int8 or nf4 is said: exact ones were asked for.
    assert (
        code == 1
        and "the exact weights need 1.6 GiB or more; streamed blocks need 1.6 GiB or more. The student" in text
    )


def test_what_is_free_of_a_gpu_is_not_asked_of_a_cpu(words, capsys):
    code, _, heard = secondcast(*words, "--max-gpu-memory", "auto", "--device", "cpu", capsys=capsys)
    assert code == 1 and heard.strip().splitlines()[-1] == (
        "secondcast: --max-gpu-memory auto uses the free GPU memory, but this run is on cpu: give a size such as 16GiB"
    )


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("gpu", "lines"),
    [
        (
            "4070",
            [
                r"does not fit: training: 36\.1 GiB, 38\.1 with a margin, at 4 rows at once, RTX 4070 has 12\.0 GiB",
                r"to fit into 12\.0 GiB: --activation-checkpointing 1 --gpu-blocks \d+, 1[01]\.\d GiB by c.*",
                r"why: the exact weights need 21\.5 GiB or more",
                r"streamed blocks use \d+\.\d GiB of pinned host memory; the results stay exact",
                r"train --max-gpu-memory 12GiB chooses these options",
            ],
        ),
        (
            "4090",
            [
                r"does not fit: training: 36\.1 GiB, 38\.1 with a margin, at 4 rows at once, RTX 4090 has 23\.6 GiB",
                r"to fit into 23\.6 GiB: --activation-checkpointing \d, 2[12]\.\d GiB by calculation \(.*",
                r"train --max-gpu-memory 23.64GiB chooses these options",
            ],
        ),
        ("h100", [r"fits: training: 36\.1 GiB, 38\.1 with a margin, at 4 rows at once, H100 SXM has 79\.2 GiB"]),
    ],
)
def test_plan_says_beforehand_what_fit_will_choose(gpu, lines, capsys):
    facts = json.loads(secondcast(*DEV, "--gpu", gpu, "--json", capsys=capsys)[1])
    assert len(facts["verdicts"]) == len(lines)
    for verdict, line in zip(facts["verdicts"], lines, strict=True):
        assert re.fullmatch(line, verdict), verdict
    ways = facts["ways"]
    assert set(ways) == ({"as_asked"} if gpu == "h100" else {"as_asked", "fitted"})
    if gpu != "h100":
        assert ways["fitted"]["gpu_memory"]["total_bytes"] < facts["gpu"]["memory_gib"] * 2**30
        assert ways["fitted"]["hours"] > ways["as_asked"]["hours"]
        pinned = ways["fitted"]["pinned_bytes"]
        assert (pinned > 0) == (gpu == "4070")
        assert ways["fitted"]["host_memory_bytes"] - ways["as_asked"]["host_memory_bytes"] == pinned


@pytest.mark.thorough
def test_a_size_goes_before_the_memory_of_the_card(capsys):
    facts = json.loads(secondcast(*DEV, "--gpu", "4090", "--max-gpu-memory", "16GiB", "--json", capsys=capsys)[1])
    assert facts["verdicts"][0] == (
        "fits: training with --max-gpu-memory 16GiB: 14.6 GiB, 15.7 with a margin, at 4 rows at once, "
        "the limit is 16.0 GiB"
    )
    assert not any("chooses these options" in verdict for verdict in facts["verdicts"])
    (fits,) = facts["fits"]
    assert fits["fits"] and fits["needed_bytes"] == facts["ways"]["fitted"]["gpu_memory"]["needed_bytes"]


@pytest.mark.thorough
def test_eight_bits_are_planned_for_a_size_as_they_are_trained(capsys):
    facts = json.loads(secondcast(*DEV, "--quantize", "int8", "--max-gpu-memory", "16GiB", "--json", capsys=capsys)[1])
    assert facts["verdicts"][0].startswith("fits: training: 13.9 GiB, 15.0 with a margin,")


@pytest.mark.thorough
def test_a_size_alone_is_taken_for_the_whole_gpu_whose_host_makes_modulation_vectors(capsys):
    planned = []
    for more in (["--max-gpu-memory", "12GiB"], ["--gpu", "4070", "--max-gpu-memory", "12GiB"]):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("secondcast.trainer.cost.stage_cost.table_rows", lambda *manifests: None)
            planned.append(json.loads(secondcast(*DEV, *more, "--json", capsys=capsys)[1]))
    sizes = [plan["ways"]["as_asked"]["gpu_memory"]["weights_bytes"] for plan in planned]
    assert sizes[0] == sizes[1] < 17 * 2**30


@pytest.mark.thorough
def test_what_no_option_makes_fit_is_said(capsys):
    facts = json.loads(secondcast(*DEV, "--max-gpu-memory", "3GiB", "--json", capsys=capsys)[1])
    assert set(facts["ways"]) == {"as_asked"}
    assert facts["verdicts"][1].startswith("nothing fits into 3.0 GiB: the exact weights need 21.5 GiB or more; str")


def out_of_memory(*arguments, **named):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("given", "flag"),
    [
        ([], "--activation-checkpointing 1"),
        (["--activation-checkpointing", 1], "--grad-accum-steps 2"),
        (["--activation-checkpointing", 1, "--grad-accum-steps", 4], "--gpu-blocks 1"),
    ],
)
def test_a_run_out_of_gpu_memory_names_the_flag_that_helps_next(words, given, flag, monkeypatch, capsys):
    monkeypatch.setattr("secondcast.models.backbone.Backbone.predict", out_of_memory)
    code, _, heard = secondcast(*words, *given, capsys=capsys)
    last = heard.strip().splitlines()[-1]
    assert code == 1 and last == (
        f"secondcast: the GPU is out of memory (the run needs 1.0 GiB by calculation): also give {flag}, or "
        "--max-gpu-memory auto to choose options"
    )


@pytest.mark.thorough
def test_the_advice_can_be_followed_in_the_same_folder(tmp_path, words, monkeypatch, capsys):
    with monkeypatch.context() as patched:
        patched.setattr("secondcast.models.backbone.Backbone.predict", out_of_memory)
        assert secondcast(*words, "--activation-checkpointing", 1, capsys=capsys)[0] == 1
    code, _, heard = secondcast(*words, "--activation-checkpointing", 1, "--grad-accum-steps", 2, capsys=capsys)
    assert code == 0, heard
    assert recorded(tmp_path / "run")["stages"][0]["grad_accum_steps"] == 2


@pytest.mark.thorough
def test_in_a_recipe_the_parts_of_a_batch_are_written(tmp_path, words, monkeypatch, capsys):
    (tmp_path / "r.toml").write_text(
        'activation-checkpointing = 1\n[[stage]]\nname = "vision"\nsteps = 2\nbatch-size = 4\n'
    )
    monkeypatch.setattr("secondcast.models.backbone.Backbone.predict", out_of_memory)
    code, _, heard = secondcast(*words[:-4], "--config", tmp_path / "r.toml", capsys=capsys)
    assert (
        code == 1 and "write grad-accum-steps = 2 into the recipe, or give --max-gpu-memory auto to choose it" in heard
    )


@pytest.mark.thorough
def test_a_library_that_finds_no_memory_is_out_of_memory_too(words, monkeypatch, capsys):
    def fails(*arguments, **named):
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")

    monkeypatch.setattr("secondcast.models.backbone.Backbone.predict", fails)
    code, _, heard = secondcast(*words, capsys=capsys)
    assert code == 1 and "the GPU is out of memory" in heard


@pytest.mark.thorough
def test_a_run_with_checkpoints_is_told_what_it_may_change(words, monkeypatch, capsys):
    assert secondcast(*words, "--activation-checkpointing", 1, "--checkpoint-every", 1, capsys=capsys)[0] == 0
    monkeypatch.setattr("secondcast.api.training.run_train", out_of_memory)
    code, _, heard = secondcast(*words, "--activation-checkpointing", 1, "--checkpoint-every", 1, capsys=capsys)
    assert code == 1 and heard.strip().endswith(
        "also give --gpu-blocks 1, or --max-gpu-memory auto to choose options; checkpoints are kept"
    )


@pytest.mark.thorough
def test_a_begun_run_of_eight_bits_goes_on_and_other_parts_than_it_has_are_refused(tmp_path, words, capsys):
    pytest.importorskip("torchao")
    eight = ["--quantize", "int8", "--activation-checkpointing", 1, "--grad-accum-steps", 2, "--ignore-replay-error"]
    assert secondcast(*words, *eight, capsys=capsys)[0] == 0
    # What fit chose is not to be said again.
    code, _, heard = secondcast(*words, "--max-gpu-memory", "80GiB", "--ignore-replay-error", capsys=capsys)
    assert code == 0 and recorded(tmp_path / "run")["quantize"] == "int8", heard
    code, _, heard = secondcast(*words, "--max-gpu-memory", "80GiB", "--grad-accum-steps", 4, capsys=capsys)
    text = " ".join(heard.split())
    assert code == 1 and "was started with grad-accum-steps = 2, not 4: the weights depend on it" in text


def test_the_parts_that_a_stage_of_a_recipe_states_are_not_for_fit_to_choose(tmp_path):
    (tmp_path / "r.toml").write_text(
        "student = 'any'\nquantize = 'nf4'\n[[stage]]\nname = 'one'\nsteps = 2\ngrad-accum-steps = 4\n"
        "[[stage]]\nname = 'two'\nsteps = 2\n"
    )
    settings = read_recipe(tmp_path / "r.toml").settings
    assert stated_options(settings, None) == {"quantize", "grad_accum_steps one"}

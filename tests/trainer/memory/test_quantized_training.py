"""Training through quantized weights: the replay error says what bias they have, and a cache built alike has none."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from secondcast.storage_schemas.errors import RunError, TeacherError
from secondcast.storage_schemas.reader import Cache
from secondcast.trainer.data.mixture import check_one_quantization
from secondcast.trainer.losses import validation as replay_error_module
from secondcast.trainer.losses.validation import ReplayError, bias_text, check_replay_error, replay_error_text
from tests.cache_builder.building import build_cache
from tests.trainer.making import make_trainer
from tests.trainer.test_train import Listening, StopAfter, run_training, same_weights

pytest.importorskip("torchao")
pytest.importorskip("bitsandbytes")
ROOT = Path(__file__).resolve().parents[3]
ROWS = 2
FLAGS: dict[str, Any] = {"batch_size": ROWS, "steps": 4, "checkpoint_every": 1, "init": "random", "replay_check": ROWS}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory, dev_teacher: Path) -> dict[str, Path]:
    """In fp32, recorded with as many rows at a time as are trained with."""
    folder = tmp_path_factory.mktemp("recorded")
    (folder / "p.txt").write_text("".join(f"a red {c} {s}\n" for c in ("dog", "cat") for s in ("left", "right", "on")))
    for kind in ("none", "int8", "nf4"):
        build_cache(
            folder / kind, dev_teacher, folder / "p.txt", dtype="float32", shard_size=2, batch_size=ROWS, quantize=kind
        )
    return {kind: folder / kind for kind in ("none", "int8", "nf4")}


def replay_error_of(relative: float) -> ReplayError:
    return ReplayError(error=0.5 * relative, by_step={}, relative=relative)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_cache_built_with_the_same_weights_has_a_replay_error_of_zero_with_a_table(
    tmp_path, recorded, dev_teacher, t5_config, kind
):
    heard = Listening()
    flags = FLAGS | {"quantize": kind, "activation_checkpointing": 1}
    run_training(tmp_path / "run", recorded[kind], dev_teacher, t5_config, progress=heard, **flags)
    assert (
        f"replay error 0 (0.00 % of the velocity's norm, {kind} weights as recorded): no student's loss can be lower"
    ) in heard.heard
    assert not any("bias" in line or "modulation" in line for line in heard.heard)


def test_quantized_weights_on_an_exact_cache_tell_their_bias_and_train(
    tmp_path, recorded, dev_teacher, t5_config, monkeypatch
):
    # Random weights this small are hardly moved by rounding.
    monkeypatch.setattr(replay_error_module, "LARGEST_REPLAY_ERROR", 1e-4)
    heard = Listening()
    run = run_training(
        tmp_path / "run", recorded["none"], dev_teacher, t5_config, progress=heard, **FLAGS | {"quantize": "nf4"}
    )
    measured = next(json.loads(line) for line in (run / "metrics.jsonl").open() if "replay_error" in line)
    assert measured["replay_error"] > 0
    told = next(line for line in heard.heard if line.startswith("replay error"))
    found = re.fullmatch(
        r"replay error \S+ \((\S+) % of the velocity's norm, nf4 weights, recorded with exact weights\): no student's "
        r"loss can be lower",
        told,
    )
    assert found and float(found[1]) > 0
    bias = next(line for line in heard.heard if "bias" in line)
    assert re.fullmatch(
        r"nf4 weights change the prediction by \d\.\d % of the velocity's norm from the exact weights of the cache: "
        r"the student is trained against that bias; a cache built with --quantize nf4 has none",
        bias,
    )


def test_exact_weights_on_a_quantized_cache_are_refused_above_the_limit_and_told_below(
    tmp_path, recorded, dev_teacher, t5_config, monkeypatch
):
    heard = Listening()
    run_training(tmp_path / "run", recorded["nf4"], dev_teacher, t5_config, progress=heard, **FLAGS)
    assert any("% of the velocity's norm, exact weights, recorded with nf4 weights): " in said for said in heard.heard)
    monkeypatch.setattr(replay_error_module, "LARGEST_REPLAY_ERROR", 1e-4)
    with pytest.raises(
        TeacherError, match=r"built with --quantize nf4, this run has the exact weights; give --quantize"
    ):
        run_training(tmp_path / "other", recorded["nf4"], dev_teacher, t5_config, **FLAGS)


def test_the_limit_is_ten_times_wider_for_quantized_weights_and_strict_where_the_cache_has_the_same():
    check_replay_error(replay_error_of(0.03), "none", "none")
    check_replay_error(replay_error_of(0.3), "none", "nf4")
    check_replay_error(replay_error_of(0.3), "int8", "nf4")
    for relative, recorded_with, here, said in [
        (0.04, "none", "none", "4.0 % of the velocity's norm, expected at most 3 %: other weights"),
        (0.04, "nf4", "nf4", "4.0 % of the velocity's norm, expected at most 3 %: other weights"),
        (0.31, "none", "nf4", "31.0 % of the velocity's norm, expected at most 30 % with nf4 weights: other weights"),
        (float("nan"), "none", "nf4", "nan % of the velocity's norm, expected at most 30 % with nf4 weights"),
    ]:
        with pytest.raises(TeacherError, match=re.escape(said)):
            check_replay_error(replay_error_of(relative), recorded_with, here)
    message = (
        "the cached embeddings replay with an error of 4.0 % of the velocity's norm, expected at most 3 %: the cache "
        "was built with --quantize nf4, this run has the exact weights; give --quantize nf4, or --ignore-replay-error"
    )
    with pytest.raises(TeacherError, match=f"^{re.escape(message)}$"):
        check_replay_error(replay_error_of(0.04), "nf4", "none")


def test_a_bias_is_told_above_three_percent_only_and_against_what():
    assert bias_text(replay_error_of(0.03), "none", "nf4") is None
    assert (
        bias_text(replay_error_of(0.2), "none", "none") is None
        and bias_text(replay_error_of(0.2), "nf4", "nf4") is None
    )
    assert bias_text(replay_error_of(0.051), "int8", "nf4") == (
        "nf4 weights change the prediction by 5.1 % of the velocity's norm from the int8 weights of the cache: the "
        "student is trained against that bias; a cache built with --quantize nf4 has none, --quantize int8 trains "
        "without"
    )
    assert replay_error_text(replay_error_of(0.051), "int8", "nf4") == (
        "replay error 0.0255 (5.10 % of the velocity's norm, nf4 weights, recorded with int8 weights): no student's "
        "loss can be lower"
    )


@pytest.mark.thorough
@pytest.mark.parametrize("kind", [pytest.param("int8", marks=pytest.mark.slow), "nf4"])
def test_interrupted_and_resumed_the_weights_are_those_of_an_unbroken_run(
    tmp_path, recorded, dev_teacher, t5_config, kind
):
    flags = FLAGS | {"quantize": kind, "activation_checkpointing": 1}
    run_training(tmp_path / "whole", recorded["none"], dev_teacher, t5_config, **flags)
    with pytest.raises(KeyboardInterrupt):
        run_training(tmp_path / "cut", recorded["none"], dev_teacher, t5_config, progress=StopAfter(2), **flags)
    message = "was started with quantize = {}, not none: the weights depend on it; give the original"
    with pytest.raises(RunError, match=message.format(kind)):
        run_training(tmp_path / "cut", recorded["none"], dev_teacher, t5_config, **flags | {"quantize": "none"})
    run_training(tmp_path / "cut", recorded["none"], dev_teacher, t5_config, **flags)
    assert same_weights(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.thorough
def test_nf4_trains_the_same_student_with_and_without_checkpointing(tmp_path, recorded, dev_teacher, t5_config):
    for every in (0, 1):
        flags = FLAGS | {"quantize": "nf4", "activation_checkpointing": every}
        run_training(tmp_path / str(every), recorded["none"], dev_teacher, t5_config, **flags)
    assert same_weights(tmp_path / "0", tmp_path / "1")


def test_nothing_of_the_backbone_gets_a_gradient(tmp_path, recorded, dev_teacher, t5_config):
    trainer = make_trainer(tmp_path, recorded["none"], dev_teacher, t5_config, quantize="nf4", batch_size=ROWS)
    with trainer.dataset.prefetch(trainer.plan.requests(0)) as batches:
        trainer._gradients(trainer.settings.at(0), 0, next(batches))
    assert any(parameter.grad is not None for parameter in trainer.student.parameters())
    parameters = list(trainer.objective.backbones[0].transformer.parameters())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in parameters)


def test_caches_of_other_weights_are_not_mixed(recorded):
    caches = {kind: Cache.open(recorded[kind]) for kind in ("none", "nf4")}
    with pytest.raises(TeacherError) as caught:
        check_one_quantization(caches)
    assert str(caught.value) == (
        "caches none and nf4 were sampled with different weights of one teacher: quantize is none in "
        f"{recorded['none']} and nf4 in {recorded['nf4']}; one backbone cannot replay both without bias: train on one "
        "of them, or build both with the same --quantize"
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_the_libraries_say_nothing_to_who_trains(tmp_path, recorded, dev_teacher, t5_config, kind):
    words = ["train", tmp_path / "run", "--cache", recorded["none"], "--student", t5_config, "--backbone", dev_teacher]
    words += [
        "--steps",
        "1",
        "--batch-size",
        "2",
        "--quantize",
        kind,
        "--activation-checkpointing",
        "1",
        "--device",
        "cpu",
    ]
    command = [sys.executable, "-c", "from secondcast import cli; cli.main()", *map(str, words), "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{tmp_path / 'run'}: student trained for 1 step\n"

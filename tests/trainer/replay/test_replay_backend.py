"""--compile and --attention-backend of a training run: checked first, said, recorded, and not to be changed."""

import shutil
from functools import partial
from pathlib import Path

import pytest
import torch

from secondcast.storage_schemas.errors import RunError, SettingsError
from secondcast.trainer.preparing import loading
from secondcast.trainer.run.config import RunConfig
from secondcast.trainer.run.folder import CONFIG_FILE
from tests.cache_builder.building import build_cache
from tests.trainer.test_train import Listening, StopAfter, run_training, same_weights

MATH = {"attention_backend": "_native_math"}
COMPILING = "the transformer's blocks are compiled at the first batch of each shape, which takes about a minute"


@pytest.fixture(scope="module")
def small_cache(tmp_path_factory: pytest.TempPathFactory, dev_teacher: Path) -> Path:
    folder = tmp_path_factory.mktemp("small")
    (folder / "p.txt").write_text("".join(f"a red {c} {s}\n" for c in ("dog", "cat") for s in ("left", "right", "on")))
    build_cache(folder / "cache", dev_teacher, folder / "p.txt", dtype="float32", shard_size=4, steps=2)
    return folder / "cache"


def test_an_attention_backend_is_used_said_and_recorded(tmp_path, small_cache, dev_teacher, t5_config):
    heard = Listening()
    run = run_training(tmp_path / "run", small_cache, dev_teacher, t5_config, progress=heard, steps=2, **MATH)
    assert (
        f"{small_cache} was recorded with attention sdpa, this run uses _native_math: the replay error includes the "
        "difference in rounding"
    ) in heard.heard
    assert any(line.endswith("held out; transformer with attention _native_math") for line in heard.heard)
    config = RunConfig.model_validate_json((run / CONFIG_FILE).read_bytes())
    assert config.settings.attention_backend == "_native_math"
    with pytest.raises(RunError, match="was started with attention-backend = _native_math, not None: "):
        run_training(run, small_cache, dev_teacher, t5_config, steps=2)


def test_the_transformer_computes_by_that_backend(small_cache, dev_teacher, t5_config, monkeypatch, tmp_path):
    loaded = []
    load = loading._load_backbone
    monkeypatch.setattr(loading, "_load_backbone", lambda *given: loaded.append(load(*given)) or loaded[0])
    run_training(tmp_path / "run", small_cache, dev_teacher, t5_config, steps=1, **MATH)
    assert loaded[0].attention_backend == "_native_math"


@pytest.mark.thorough
def test_of_the_caches_backend_nothing_is_remarked(tmp_path, dev_teacher, prompt_file, t5_config):
    build_cache(tmp_path / "c", dev_teacher, prompt_file, dtype="float32", steps=1, **MATH)
    heard = Listening()
    run_training(tmp_path / "run", tmp_path / "c", dev_teacher, t5_config, progress=heard, steps=1, **MATH)
    assert not any("was recorded with attention" in line for line in heard.heard)


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("flush", "^--attention-backend 'flush' is unknown to diffusers, expected one of .*, flash, "),
        ("_native_cudnn", "^--attention-backend '_native_cudnn' does not work on cpu in float32"),
    ],
)
def test_a_backend_that_does_not_compute_here_is_refused_before_weights_are_read(
    tmp_path, small_cache, dev_teacher, t5_config, monkeypatch, backend, message
):
    monkeypatch.setattr("diffusers.FluxTransformer2DModel.from_pretrained", None)
    with pytest.raises(SettingsError, match=message):
        run_training(tmp_path / "run", small_cache, dev_teacher, t5_config, attention_backend=backend)
    assert not (tmp_path / "run").exists()


def test_without_a_compiler_nothing_is_read_and_nothing_written(
    tmp_path, small_cache, dev_teacher, t5_config, monkeypatch
):
    monkeypatch.setattr("diffusers.FluxTransformer2DModel.from_pretrained", None)
    with (
        torch._inductor.config.patch({"cpp.cxx": (None, "g-plus-plus")}),
        pytest.raises(SettingsError, match=r"^--compile does not work on cpu \(No working C\+\+ compiler found in "),
    ):
        run_training(tmp_path / "run", small_cache, dev_teacher, t5_config, compile=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling on a CPU needs a C++ compiler (g++)")
def test_a_compiled_run_says_so_and_goes_on_to_the_same_bits(tmp_path, small_cache, dev_teacher, t5_config):
    flags = {"steps": 4, "checkpoint_every": 1, "compile": True}
    heard = Listening()
    unbroken = run_training(tmp_path / "one", small_cache, dev_teacher, t5_config, progress=heard, **flags)
    assert COMPILING in heard.heard
    assert any(line.endswith("held out; transformer with attention sdpa, compiled") for line in heard.heard)
    again = partial(run_training, tmp_path / "run", small_cache, dev_teacher, t5_config)
    with pytest.raises(KeyboardInterrupt):
        again(progress=StopAfter(3), **flags)
    with pytest.raises(RunError, match="was started with compile = True, not False: the weights depend on it"):
        again(**flags | {"compile": False})
    # As in a process of its own.
    torch._dynamo.reset()
    again(activation_checkpointing=1, **flags)
    assert same_weights(tmp_path / "run", unbroken)

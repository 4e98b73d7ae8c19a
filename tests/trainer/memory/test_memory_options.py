"""The backbone's memory options in training: the student that comes out is, bit for bit, that of the plain backbone."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from secondcast.models.teacher.folder import REPLAY_PARTS, find_teacher
from secondcast.storage_schemas.errors import RunError, SettingsError
from secondcast.storage_schemas.progress import Silent
from secondcast.storage_schemas.reader import Cache
from secondcast.trainer.settings import TrainFlags
from secondcast.trainer.train import train
from tests.cache_builder.building import build_cache
from tests.trainer.making import make_trainer
from tests.trainer.test_train import Listening, StopAfter, run_training, same_weights, weights

# The calls with the most bits of their own: one row is multiplied by another kernel than two are.
ROWS = 1
FLAGS: dict[str, Any] = {"batch_size": 2 * ROWS, "grad_accum_steps": 2, "steps": 4, "dropout": 0.1, "init": "random"}


@pytest.fixture(scope="module")
def exact_cache(tmp_path_factory: pytest.TempPathFactory, dev_teacher: Path) -> Path:
    """In fp32, recorded with as many rows at a time as are trained with."""
    folder = tmp_path_factory.mktemp("exact")
    (folder / "p.txt").write_text("".join(f"a red {c} {s}\n" for c in ("dog", "cat") for s in ("left", "right", "on")))
    build_cache(folder / "cache", dev_teacher, folder / "p.txt", dtype="float32", shard_size=4, batch_size=ROWS)
    return folder / "cache"


@pytest.fixture(scope="module")
def plain(tmp_path_factory, exact_cache, dev_teacher, t5_config) -> Path:
    run = tmp_path_factory.mktemp("plain") / "run"
    return run_training(run, exact_cache, dev_teacher, t5_config, modulation="gpu", **FLAGS)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "options",
    [
        {"modulation": "precomputed"},
        {"modulation": "cpu"},
        {"activation_checkpointing": 1},
        {"activation_checkpointing": 2},
        {"gpu_blocks": 0},
        {"gpu_blocks": 1, "activation_checkpointing": 1, "modulation": "gpu"},
    ],
)
def test_the_students_weights_keep_their_bits(tmp_path, exact_cache, dev_teacher, t5_config, plain, options):
    run_training(tmp_path / "run", exact_cache, dev_teacher, t5_config, **FLAGS | options)
    assert same_weights(tmp_path / "run", plain)


@pytest.mark.thorough
def test_the_table_is_on_by_default_and_its_replay_error_is_zero(tmp_path, exact_cache, dev_teacher, t5_config):
    trainer = make_trainer(tmp_path / "run", exact_cache, dev_teacher, t5_config, **FLAGS)
    guidance = trainer.dataset.sources[0].cache.manifest.sampling.guidance
    assert [len(backbone.table) for backbone in trainer.objective.backbones] == [4 * len(guidance)]
    heard = Listening()
    run_training(tmp_path / "of-1", exact_cache, dev_teacher, t5_config, progress=heard, **FLAGS | {"replay_check": 5})
    assert any(line.startswith("replay error 0 (0.00 %") for line in heard.heard)
    assert not any("modulation" in line for line in heard.heard)


@pytest.mark.thorough
def test_a_run_goes_on_with_other_checkpointing_and_not_with_other_modulation(
    tmp_path, exact_cache, dev_teacher, t5_config, plain
):
    flags = FLAGS | {"checkpoint_every": 1, "modulation": "gpu"}
    again = partial(run_training, tmp_path / "run", exact_cache, dev_teacher, t5_config)
    with pytest.raises(KeyboardInterrupt):
        again(progress=StopAfter(3), **flags)
    with pytest.raises(RunError, match=r"was started with modulation = gpu, not auto: the weights depend on it"):
        again(**flags | {"modulation": "auto"})
    again(activation_checkpointing=1, **flags)
    one, other = weights(tmp_path / "run"), weights(plain)
    assert all(torch.equal(one[name], other[name]) for name in other)


@pytest.mark.thorough
def test_caches_with_pooled_vectors_are_trained_on_with_the_weights(tmp_path, dev_teacher, prompt_file, t5_config):
    build_cache(tmp_path / "c", dev_teacher, prompt_file, pooled="clip", steps=2)
    heard = Listening()
    run_training(tmp_path / "run", tmp_path / "c", dev_teacher, t5_config, progress=heard, steps=2)
    assert (
        "modulation is not precomputed: the pooled vectors of CLIP are part of them; its weights stay in memory"
    ) in heard.heard
    with pytest.raises(SettingsError, match=r"--modulation is precomputed, but the cache has CLIP's pooled vectors, "):
        run_training(tmp_path / "other", tmp_path / "c", dev_teacher, t5_config, steps=2, modulation="precomputed")


@pytest.mark.slow
@pytest.mark.parametrize(("modulation", "pooled"), [("precomputed", "zero"), ("cpu", "clip")])
def test_caches_of_other_schedules_share_what_gives_their_modulation(
    tmp_path, dev_teacher, prompt_file, t5_config, modulation, pooled
):
    for steps in (2, 3):
        flags = {"steps": steps, "guidance": (float(steps),), "pooled": pooled}
        build_cache(tmp_path / f"{steps}", dev_teacher, prompt_file, **flags)
    caches = {str(steps): Cache.open(tmp_path / f"{steps}") for steps in (2, 3)}
    settings = TrainFlags.from_flags(student=str(t5_config), steps=4, batch_size=4, modulation=modulation).settings()
    teacher = find_teacher(str(dev_teacher), REPLAY_PARTS)
    train(
        tmp_path / "run", settings, caches, teacher, torch.device("cpu"), Silent(), student_source=str(t5_config),
        ignore_replay_error=False,
    )  # fmt: skip
    assert (tmp_path / "run/checkpoint-00000004").is_dir()


def test_streaming_is_refused_where_it_cannot_be(tmp_path, exact_cache, dev_teacher, t5_config):
    with pytest.raises(SettingsError, match="activation-checkpointing is 2 with gpu-blocks, expected 0 or 1: streamed"):
        TrainFlags.from_flags(student="x", activation_checkpointing=2, gpu_blocks=0)
    with pytest.raises(SettingsError, match="--gpu-blocks is 9, expected 0 to 3, the number of loaded blocks"):
        run_training(tmp_path / "run", exact_cache, dev_teacher, t5_config, **FLAGS | {"gpu_blocks": 9})

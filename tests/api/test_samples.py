"""`train --sample-every`: pictures of the run's own student, which change nothing of the run."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from secondcast.api.fitting import _check_room_to_decode
from secondcast.api.samples import Samples
from secondcast.evaluation.closed_loop import RecordedInputs, decoded
from secondcast.evaluation.replaying import CacheStudent, on_device
from secondcast.inspection.report.run import PROMPTS_KEY, sample_file
from secondcast.inspection.sheet import labelled_strip, stacked
from secondcast.models.cost.gpu_memory import GpuMemory
from secondcast.models.memory.options import PLAIN
from secondcast.models.recorded_backbone import load_recorded_backbone
from secondcast.models.teacher.folder import REPLAY_PARTS, find_teacher
from secondcast.models.teacher.image_decoder import load_recorded_decoder
from secondcast.storage_schemas.errors import NotInCacheError, SettingsError
from secondcast.storage_schemas.progress import Silent
from secondcast.storage_schemas.reader import Cache
from secondcast.trainer.distributed.processes import SINGLE_PROCESS, Distributed
from secondcast.trainer.settings import TrainFlags
from secondcast.trainer.train import train
from tests.cache_builder.building import build_cache
from tests.commands.test_cli import secondcast
from tests.trainer.conftest import cache_folder, t5_config
from tests.trainer.data.worlds import CPU, WELL, in_two
from tests.trainer.test_train import StopAfter, same_weights

__all__ = ["cache_folder", "t5_config"]

FLAGS = {"steps": 4, "batch_size": 4, "checkpoint_every": 2, "replay_check": 4, "validate_rows": 8, "dropout": 0.1}


@pytest.fixture
def words(tmp_path, cache_folder, dev_teacher, t5_config):
    flags = [
        word for key, value in FLAGS.items() if key != "validate_rows" for word in (f"--{key.replace('_', '-')}", value)
    ]
    return [
        "train", tmp_path / "run", "--cache", cache_folder, "--student", t5_config, "--backbone", dev_teacher, *flags,
    ]  # fmt: skip


@pytest.fixture
def run_with(cache_folder, dev_teacher, t5_config) -> Callable[..., Path]:
    """Trains with samples every two steps unless every is None; the lines of Samples go to `said`."""

    def trained(
        run: Path, *, every: int | None = 2, ids=(), progress=None, processes: Distributed = SINGLE_PROCESS,
        said: list[str] | None = None, **changes,
    ) -> Path:  # fmt: skip
        settings = TrainFlags.from_flags(student=str(t5_config), **FLAGS | changes).settings()
        caches = {"cache": Cache.open(cache_folder)}
        say = [].append if said is None else said.append
        observers = [] if every is None else [Samples.open(every, ids, settings, caches, str(dev_teacher), say)]
        train(
            run, settings, caches, find_teacher(str(dev_teacher), REPLAY_PARTS), CPU, progress or Silent(),
            student_source=str(t5_config), processes=processes, observers=observers,
        )  # fmt: skip
        return run

    return trained


def names(run: Path) -> list[str]:
    return sorted(file.name for file in (run / "samples").iterdir())


def logged(run: Path) -> list[dict]:
    """Without times, which no two runs share."""
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: entry[key] for key in entry if key != "seconds"} for entry in entries if "summary" not in entry]


def test_a_run_with_samples_ends_with_the_bits_of_one_without(tmp_path, run_with):
    said: list[str] = []
    run_with(tmp_path / "with", said=said)
    run_with(tmp_path / "without", every=None)
    assert same_weights(tmp_path / "with", tmp_path / "without")
    assert logged(tmp_path / "with") == logged(tmp_path / "without")
    assert names(tmp_path / "with") == [f"step-00000{step}.png" for step in (0, 2, 4)]
    assert said == [f"step {step}: 1 sample in {sample_file(tmp_path / 'with', step)}" for step in (0, 2, 4)]
    assert not (tmp_path / "without/samples").exists()


def test_a_sample_is_what_evaluation_samples_with_the_student_of_that_step(
    tmp_path, run_with, cache_folder, dev_teacher
):
    run = run_with(tmp_path / "run", ids=["3"], keep_checkpoints=9)
    cache, teacher = Cache.open(cache_folder), find_teacher(str(dev_teacher), ("transformer", "vae"))
    trajectory, sampling = cache.trajectory(3), cache.manifest.sampling
    backbone = load_recorded_backbone(
        [cache.manifest], teacher, dtype=torch.bfloat16, batch_rows=4, options=PLAIN, attention_backend=None, device=CPU
    )  # fmt: skip
    assert sampling.dtype == "bfloat16"
    decoder = load_recorded_decoder(teacher, sampling, CPU)
    student = CacheStudent.open(run / "checkpoint-00000002/student", cache, CPU)
    student.network.eval()
    final_BSC = RecordedInputs.of(cache, [trajectory], backbone).final_latent(student.embeddings([trajectory.prompt]))
    taught_HWC = decoded(decoder, on_device([trajectory.final_latent_SC], CPU))[0]
    text = cache.prompts[trajectory.prompt].text
    side = 128 // sampling.height * sampling.height
    pictures = {"teacher": taught_HWC, "student": decoded(decoder, final_BSC)[0]}
    expected = stacked([labelled_strip(f"3: {text}", pictures, side)])
    with Image.open(sample_file(run, 2)) as found:
        assert np.array_equal(np.asarray(found), np.asarray(expected))
        assert found.info[PROMPTS_KEY] == f"3: {text}"
    assert not np.array_equal(pictures["teacher"], pictures["student"])


def test_a_resumed_run_samples_on_as_an_unbroken_one(tmp_path, run_with):
    run_with(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run_with(tmp_path / "cut", progress=StopAfter(3))
    assert names(tmp_path / "cut") == ["step-000000.png", "step-000002.png"]
    (tmp_path / "cut/samples/step-000002.png").unlink()
    run_with(tmp_path / "cut")
    pictures = [
        {file.name: file.read_bytes() for file in (tmp_path / run / "samples").iterdir()} for run in ("cut", "whole")
    ]
    assert pictures[0] == pictures[1] and len(pictures[0]) == 3


def test_pictures_are_shown_in_tensorboard_too(tmp_path, words, capsys):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    code, _, heard = secondcast(*words, "--sample-every", 3, "--report-to", "tensorboard", capsys=capsys)
    assert code == 0 and "step 3: 1 sample in " in heard
    events = accumulator.EventAccumulator(str(tmp_path / "run/tensorboard"), size_guidance={accumulator.IMAGES: 0})
    events.Reload()
    assert [event.step for event in events.Images("samples")] == [0, 3, 4]
    with Image.open(sample_file(tmp_path / "run", 4)) as sheet:
        last = events.Images("samples")[-1]
        assert (last.width, last.height) == sheet.size
    assert "sample_every" not in (tmp_path / "run/config.json").read_text()


def test_chosen_trajectories_are_named_as_inspect_names_them(tmp_path, run_with, cache_folder):
    cache = Cache.open(cache_folder)
    key = cache.trajectory(5).key
    run = run_with(tmp_path / "run", steps=1, ids=["0", key, f"cache={key[:12]}"])
    texts = [cache.prompts[cache.trajectory(index).prompt].text for index in (0, 5)]
    with Image.open(sample_file(run, 1)) as found:
        assert found.info[PROMPTS_KEY].split("\n") == [f"0: {texts[0]}", f"5: {texts[1]}"]


@pytest.mark.thorough
def test_trajectories_of_several_caches_and_more_than_a_batch_are_on_one_sheet(
    tmp_path, words, cache_folder, dev_teacher, capsys
):
    (tmp_path / "p.txt").write_text("a red dog\na blue dog\ntwo cats\n")
    build_cache(tmp_path / "large", dev_teacher, tmp_path / "p.txt", resolution=32)
    ids = [word for key in ("large=1", "0", "1", "2") for word in ("--sample-ids", key)]
    more = ["--cache", f"large={tmp_path}/large", "--batch-size", 2, "--sample-every", 9, *ids]
    code, _, heard = secondcast(*words, *more, capsys=capsys)
    assert code == 0 and "step 4: 4 samples in " in heard
    with Image.open(sample_file(tmp_path / "run", 4)) as sheet:
        texts = sheet.info[PROMPTS_KEY].split("\n")
    small = Cache.open(cache_folder)
    assert texts == [*(f"{index}: {small.prompts[index].text}" for index in range(3)), "1: a blue dog"]


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        (["99"], NotInCacheError, "trajectory 99 is not in .*: 19 trajectories, numbered 0 to 18"),
        (
            ["other=1"],
            SettingsError,
            "--sample-ids 'other=1' names the cache 'other', expected cache, the caches with ",
        ),
    ],
)
def test_trajectories_that_are_not_there_are_refused_before_weights_are_loaded(tmp_path, run_with, ids, error, message):
    with pytest.raises(error, match=message):
        run_with(tmp_path / "run", ids=ids)
    assert not (tmp_path / "run").exists()


def test_without_a_vae_or_a_whole_transformer_samples_are_refused_in_one_line(tmp_path, words, dev_teacher, capsys):
    shutil.copytree(dev_teacher, tmp_path / "t")
    shutil.rmtree(tmp_path / "t/vae")
    bare = [tmp_path / "t" if word == dev_teacher else word for word in words]
    code, _, heard = secondcast(*bare, "--sample-every", 2, capsys=capsys)
    assert code == 1 and heard.count("\n") == 1
    assert heard.startswith(f"secondcast: --sample-every decodes with the teacher's VAE: {tmp_path}/t has no vae/")
    assert heard.endswith("; or remove --sample-every\n")
    code, _, heard = secondcast(*words, "--loss", "context", "--sample-every", 2, capsys=capsys)
    assert code == 1 and heard == (
        "secondcast: --sample-every is 2, but no stage has the vision loss, so the run does not load the whole "
        "transformer that samples need: remove it, and use `secondcast generate` after training\n"
    )
    code, _, heard = secondcast(*words, "--sample-ids", 2, capsys=capsys)
    assert (code, heard) == (
        1, "secondcast: --sample-ids is 2 without --sample-every: give --sample-every N, in steps\n",
    )  # fmt: skip
    assert not (tmp_path / "run").exists()


def test_a_run_on_text_caches_alone_has_nothing_to_sample(tmp_path, words, dev_teacher, cache_folder, capsys):
    (tmp_path / "p.txt").write_text("a red dog\n")
    build_cache(tmp_path / "text", dev_teacher, tmp_path / "p.txt", steps=20, text_only=True)
    text = [tmp_path / "text" if word == cache_folder else word for word in words]
    code, _, heard = secondcast(*text, "--sample-every", 2, "--sample-ids", 0, capsys=capsys)
    assert (
        code == 1 and heard.count("\n") == 1 and heard.startswith("secondcast: --sample-every needs trajectories, but ")
    )
    assert not (tmp_path / "run").exists()


def test_a_limit_of_memory_without_room_for_the_vae_is_refused():
    memory = GpuMemory(weights_bytes=6 * 2**30, student_bytes=2**30, sample_bytes=2**28, batch_size=2)
    _check_room_to_decode(memory, 2**29, 0)
    _check_room_to_decode(memory, 2 * 2**30, 12 * 2**30)
    with pytest.raises(SettingsError, match=r"^--sample-every needs 2.0 GiB for the VAE, and with .* leaves 8.5 GiB: "):
        _check_room_to_decode(memory, 2 * 2**30, 8.5 * 2**30)


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True])
def test_of_two_processes_the_first_samples_and_both_end(tmp_path, run_with, sharded):
    run_with(tmp_path / "one", dropout=0.0)
    done = in_two(
        lambda processes: run_with(tmp_path / "two", processes=processes, dropout=0.0) and None, sharded=sharded
    )
    assert done == WELL and names(tmp_path / "two") == names(tmp_path / "one")
    with Image.open(sample_file(tmp_path / "one", 0)) as one, Image.open(sample_file(tmp_path / "two", 0)) as two:
        difference = np.abs(np.asarray(one, dtype=np.int32) - np.asarray(two, dtype=np.int32))
    # The same student before the first step; a sharded one may round its embeddings differently.
    assert np.percentile(difference, 99) <= 8

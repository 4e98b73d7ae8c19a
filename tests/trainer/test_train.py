"""Phase 2: only the student moves, nothing of the text encoder is needed, a resumed run is an unbroken one."""

import json
import re
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5EncoderModel

from secondcast.models import attention
from secondcast.models.student.folder import checkpoints, student_folder
from secondcast.models.student.student import new_student
from secondcast.models.teacher.folder import REPLAY_PARTS, TeacherFolder, find_teacher
from secondcast.storage_schemas.errors import (
    NonFiniteError,
    NotInCacheError,
    RunError,
    SettingsError,
    StudentError,
    TeacherError,
)
from secondcast.storage_schemas.progress import Silent
from secondcast.storage_schemas.reader import Cache
from secondcast.trainer.data.mixture import TrainingCache, split
from secondcast.trainer.loop import Observer
from secondcast.trainer.losses import validation as replay_error_module
from secondcast.trainer.preparing import loading
from secondcast.trainer.settings import TrainFlags
from secondcast.trainer.train import train
from secondcast.trainer.training_set import TrainingSet

CPU = torch.device("cpu")


def run_training(
    run: Path,
    cache: Path,
    teacher: Path | None,
    student: Path,
    *,
    progress: Silent | None = None,
    ignore_replay_error: bool = False,
    observers=(),
    **flags,
) -> Path:
    # Measuring the replay error on as many records as users do would take half of the time of such short runs.
    few = {"replay_check": 4, "validate_rows": 16}
    flags = {"steps": 6, "batch_size": 4, "checkpoint_every": 2, "learning_rate": 1e-3, **few, **flags}
    settings = TrainFlags.from_flags(student=str(student), **flags).settings()
    folder: TeacherFolder | None = find_teacher(str(teacher), REPLAY_PARTS) if teacher else None
    train(
        run,
        settings,
        {"cache": Cache.open(cache)},
        folder,
        CPU,
        progress or Silent(),
        student_source=str(student),
        ignore_replay_error=ignore_replay_error,
        observers=observers,
    )
    return run


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoints(run)[-1] / "student/model.safetensors")


def same_weights(a: Path, b: Path) -> bool:
    """Of the last checkpoints: what is exported, what goes on training, and the moments."""
    one, other = ({p.relative_to(run): load_file(p) for p in tensor_files(run)} for run in (a, b))
    return one.keys() == other.keys() and all(
        one[file].keys() == other[file].keys()
        and all(torch.equal(one[file][name], other[file][name]) for name in one[file])
        for file in one
    )


def tensor_files(run: Path) -> list[Path]:
    return sorted(checkpoints(run)[-1].rglob("*.safetensors"))


class StopAfter(Silent):
    def __init__(self, steps: int) -> None:
        self.left = steps

    def bar(self, title, **counts):
        return nullcontext(self)

    def advance(self, count, note=""):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


class Listening(Silent):
    def __init__(self) -> None:
        self.heard: list[str] = []

    def say(self, message):
        self.heard.append(message)


@pytest.mark.thorough
def test_it_trains_on_a_folder_without_text_encoders_tokenizers_and_vae(tmp_path, cache_folder, dev_teacher, t5_config):
    shutil.copytree(dev_teacher, tmp_path / "t")
    for part in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "vae"):
        shutil.rmtree(tmp_path / "t" / part)
    run_training(tmp_path / "run", cache_folder, tmp_path / "t", t5_config)
    run_training(tmp_path / "with", cache_folder, dev_teacher, t5_config)
    assert same_weights(tmp_path / "run", tmp_path / "with")


@pytest.mark.thorough
def test_only_the_students_parameters_move(tmp_path, cache_folder, dev_teacher, t5_config, monkeypatch):
    kept = {}
    real = loading._load_backbone

    def watching(*arguments):
        kept["backbone"] = real(*arguments)
        kept["before"] = {n: p.clone() for n, p in kept["backbone"].transformer.state_dict().items()}
        return kept["backbone"]

    monkeypatch.setattr(loading, "_load_backbone", watching)
    run_training(tmp_path / "run", cache_folder, dev_teacher, t5_config, weight_decay=0.0)
    transformer = kept["backbone"].transformer
    assert all(torch.equal(p, kept["before"][n]) for n, p in transformer.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in transformer.parameters())
    first = new_student(str(t5_config), Cache.open(cache_folder).manifest.teacher, init="auto", dropout=0.1, seed=0)
    after = weights(tmp_path / "run")
    still = [name for name, value in first.state_dict().items() if name in after and torch.equal(value, after[name])]
    assert still == []


SHARING = {
    "data_order": "shuffled", "timesteps_per_sample": 2, "grad_accum_steps": 2, "ema_decay": 0.9,
    "pretrain_loss": "context",
    "lr_warmup_steps": 3, "lr_schedule": "linear", "huber_delta": 0.5, "timestep_weighting": "sigma",
    "embedding_loss_weight": 0.1,
}  # fmt: skip


CUTS = [
    ({"data_order": "shuffled"}, 1),
    ({"data_order": "sequential"}, 3),
    pytest.param({"data_order": "sequential"}, 7, marks=pytest.mark.slow),
    pytest.param(SHARING, 3, marks=pytest.mark.slow),
    (SHARING, 7),
]


@pytest.mark.thorough
@pytest.mark.parametrize(("options", "stop"), CUTS)
def test_interrupted_and_resumed_the_weights_are_those_of_an_unbroken_run(
    tmp_path, cache_folder, dev_teacher, t5_config, options, stop
):
    flags = {"pretrain_steps": 4, "steps": 4, "lr_schedule": "cosine", "dropout": 0.2, **options}
    run_training(tmp_path / "whole", cache_folder, dev_teacher, t5_config, **flags)
    with pytest.raises(KeyboardInterrupt):
        run_training(tmp_path / "cut", cache_folder, dev_teacher, t5_config, progress=StopAfter(stop), **flags)
    run_training(tmp_path / "cut", cache_folder, dev_teacher, t5_config, **flags)
    assert same_weights(tmp_path / "cut", tmp_path / "whole")
    steps = [
        json.loads(line)["step"] for line in (tmp_path / "cut/metrics.jsonl").read_text().splitlines() if "kind" in line
    ]
    assert steps == list(range(8))


@pytest.mark.slow
def test_the_vision_loss_falls(tmp_path, cache_folder, dev_teacher, t5_config):
    run_training(
        tmp_path / "run",
        cache_folder,
        dev_teacher,
        t5_config,
        steps=80,
        dropout=0.0,
        learning_rate=3e-3,
        batch_size=16,
        checkpoint_every=1000,
    )
    losses = [
        json.loads(line)["loss"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines() if "kind" in line
    ]
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


@pytest.mark.thorough
def test_a_warm_up_alone_needs_no_transformer(tmp_path, cache_folder, t5_config):
    flags = {"steps": 0, "pretrain_steps": 40, "pretrain_loss": "embedding", "dropout": 0.0}
    run_training(tmp_path / "run", cache_folder, None, t5_config, **flags)
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines if "kind" in line]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_held_out_prompts_are_never_trained_on(cache_folder):
    cache = Cache.open(cache_folder)
    training_cache = TrainingCache(name="cache", cache=cache, training_set=TrainingSet.of(cache))
    training, held_out = split([training_cache], CPU)
    assert all(not cache.prompts[training.prompt_of(i)[1]].held_out for i in range(len(training)))
    assert all(cache.prompts[held_out.prompt_of(i)[1]].held_out for i in range(len(held_out)))
    assert len(training) + len(held_out) == len(cache)
    assert len(held_out) == cache.manifest.prompts.held_out > 0


@pytest.mark.thorough
def test_the_replay_error_is_zero_on_the_machine_that_recorded(tmp_path, cache_folder, dev_teacher, t5_config):
    listening = Listening()
    run_training(tmp_path / "run", cache_folder, dev_teacher, t5_config, progress=listening)
    assert any(line.startswith("replay error 0 (0.00 % of the velocity's norm)") for line in listening.heard)


def test_other_weights_are_refused_by_the_file(tmp_path, cache_folder, dev_teacher, t5_config):
    shutil.copytree(dev_teacher / "transformer", tmp_path / "t/transformer")
    file = tmp_path / "t/transformer/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["proj_out.bias"] = tensors["proj_out.bias"] + 1
    save_file(tensors, file)
    with pytest.raises(
        TeacherError, match=r"diffusion_pytorch_model.safetensors has sha256 \w{16}, but the cache was recorded with"
    ):
        run_training(tmp_path / "run", cache_folder, tmp_path / "t", t5_config)


@pytest.mark.thorough
def test_a_replay_error_above_the_limit_stops_unless_accepted(
    tmp_path, cache_folder, dev_teacher, t5_config, monkeypatch
):
    monkeypatch.setattr(replay_error_module, "LARGEST_REPLAY_ERROR", 1e-6)
    flags = {"backbone_dtype": "float32"}
    with pytest.raises(
        TeacherError, match=r"replay with an error of \d\.\d % of the velocity's norm, expected at most 0 %"
    ):
        run_training(tmp_path / "run", cache_folder, dev_teacher, t5_config, **flags)
    run_training(tmp_path / "run", cache_folder, dev_teacher, t5_config, ignore_replay_error=True, **flags)


@pytest.mark.thorough
def test_a_run_with_other_settings_is_refused_by_the_flag(tmp_path, cache_folder, dev_teacher, t5_config):
    run_training(tmp_path / "run", cache_folder, dev_teacher, t5_config)
    with pytest.raises(RunError, match="was started with learning-rate = 0.001, not 0.5"):
        run_training(tmp_path / "run", cache_folder, dev_teacher, t5_config, learning_rate=0.5)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/x").write_text("")
    with pytest.raises(RunError, match=r"other has other files but no config.json"):
        run_training(tmp_path / "other", cache_folder, dev_teacher, t5_config)


@pytest.mark.thorough
def test_a_loss_that_is_not_finite_stops_keeps_the_last_checkpoint_and_names_the_records(
    tmp_path, cache_folder, dev_teacher, t5_config
):
    flags = {
        "steps": 20,
        "checkpoint_every": 1,
        "learning_rate": 1e20,
        "max_grad_norm": 1e9,
        "batch_size": 6,
        "dropout": 0.0,
    }
    with pytest.raises(NonFiniteError) as raised:
        run_training(tmp_path / "run", cache_folder, dev_teacher, t5_config, **flags)
    stopped = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    step = stopped["step"]
    assert 0 < step < 20 and len(stopped["records"]) == 6
    assert re.fullmatch(
        rf"vision (loss|norm of the gradient) is (nan|inf) at step {step}, in the batch of "
        rf"{', '.join(stopped['records'][:4])} and 2 more \(metrics.jsonl names them\): stopped, the last "
        r"checkpoint is intact; lower --learning-rate and run it again with a new run folder",
        str(raised.value),
    )
    cache = Cache.open(cache_folder)
    for record in stopped["records"]:
        key, k = record.split(" step ")
        assert cache.trajectory(cache.key_index(key)).key == key and 0 <= int(k) < 4
    assert checkpoints(tmp_path / "run")[-1].name == f"checkpoint-{step:08d}"
    assert all(torch.isfinite(value).all() for value in weights(tmp_path / "run").values())


def test_an_unfinished_cache_without_trajectories_is_told_so(tmp_path, cache_folder, dev_teacher, t5_config):
    shutil.copytree(cache_folder, tmp_path / "c")
    for record in (tmp_path / "c/commits").glob("*"):
        if "trajectories" in record.name or record.name == "index.json":
            record.unlink()
    with pytest.raises(
        NotInCacheError, match="has 0 committed trajectories, 0 of them held out: there is nothing to train on"
    ):
        run_training(tmp_path / "run", tmp_path / "c", dev_teacher, t5_config)


def test_a_t5_that_has_learnt_other_pieces_is_refused_unless_its_weights_are_new(
    tmp_path, cache_folder, dev_teacher, t5_config
):
    T5EncoderModel(T5Config.from_pretrained(t5_config)).save_pretrained(tmp_path / "t5")
    tokenizer = json.loads((dev_teacher / "tokenizer_2/tokenizer.json").read_bytes())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary[3:5] = vocabulary[4:2:-1]
    (tmp_path / "t5/tokenizer.json").write_text(json.dumps(tokenizer))
    message = (
        f"the tokenizer of {tmp_path / 't5'} has the piece {vocabulary[3][0]!r} as token id 3, expected "
        f"{vocabulary[4][0]!r}, that of the teacher, whose token ids the student reads: give one with the teacher's "
        "tokenizer, or train it from scratch with --init random"
    )
    with pytest.raises(StudentError, match=f"^{re.escape(message)}$"):
        run_training(tmp_path / "run", cache_folder, dev_teacher, tmp_path / "t5")
    assert not (tmp_path / "run").exists()
    run_training(tmp_path / "run", cache_folder, dev_teacher, tmp_path / "t5", init="random", steps=1)


@pytest.mark.thorough
def test_a_student_of_another_width_is_refused(tmp_path, cache_folder, dev_teacher, t5_config):
    run_training(tmp_path / "run", cache_folder, dev_teacher, t5_config)
    export = student_folder(tmp_path / "run")
    config = json.loads((export / "config.json").read_bytes()) | {"project_out_dim": 30}
    shutil.copytree(export, tmp_path / "s")
    (tmp_path / "s/config.json").write_text(json.dumps(config))
    with pytest.raises(StudentError, match=r"has embeddings of width 30, but this teacher reads 24|cannot be loaded"):
        run_training(tmp_path / "again", cache_folder, dev_teacher, tmp_path / "s")


def test_more_steps_of_a_trajectory_than_it_has_are_refused(tmp_path, cache_folder, dev_teacher, t5_config):
    with pytest.raises(
        SettingsError, match=r"--timesteps-per-sample is 8, but the trajectories of .* have 4 steps: .* most 4"
    ):
        run_training(tmp_path / "run", cache_folder, dev_teacher, t5_config, batch_size=8, timesteps_per_sample=8)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"steps": 0, "pretrain_steps": 0}, "steps and pretrain-steps are both 0"),
        ({"dropout": 1.0}, r"--dropout is 1.0, expected less than 1"),
        ({"learning_rate": 0}, "--learning-rate is 0, expected more than 0"),
        (
            {"batch_size": 10, "grad_accum_steps": 2, "timesteps_per_sample": 3},
            r"batch-size is 10, .* 2 x 3: .*; use 6",
        ),
        ({"batch_size": 2, "grad_accum_steps": 4}, r"batch-size is 2, expected a multiple of .* 4 x 1: .*; use 4"),
        (
            {"data_order": "sequential", "timesteps_per_sample": 2},
            "timesteps-per-sample is 2 with data-order sequential, expected 1",
        ),
        (
            {"loss": "context", "timestep_weighting": "sigma"},
            "timestep-weighting is sigma with loss context: it only applies to",
        ),
        ({"loss": "embedding", "embedding_loss_weight": 0.5}, "embedding-loss-weight is 0.5 with loss embedding"),
        ({"loss": "embedding", "timesteps_per_sample": 2}, "timesteps-per-sample is 2 with loss embedding"),
        ({"loss": "naive"}, "--loss is 'naive', expected 'vision', 'depth', 'embedding' or 'context'"),
        ({"huber_delta": 0}, r"--huber-delta is 0, expected more than 0"),
        ({"ema_decay": 1.0}, r"--ema-decay is 1.0, expected less than 1"),
        ({"grad_accum_steps": 0}, r"--grad-accum-steps is 0, expected at least 1"),
        ({"keep_checkpoints": 0}, r"--keep-checkpoints is 0, expected at least 1"),
        ({"lr_warmup_steps": -1}, r"--lr-warmup-steps is -1, expected at least 0"),
        (
            {"student_dtype": "float16"},
            "--student-dtype is 'float16', expected 'auto', 'float32' or ",
        ),
        ({"optimiser": "sgd"}, "--optimiser is an unknown key"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(flags, message):
    with pytest.raises(SettingsError, match=message):
        TrainFlags.from_flags(student="x", **flags)


@pytest.mark.thorough
def test_a_run_that_is_through_says_so_and_stays_as_it_is(tmp_path, cache_folder, dev_teacher, t5_config):
    run_training(tmp_path / "run", cache_folder, dev_teacher, t5_config)
    before = {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()}
    heard = Listening()
    run_training(tmp_path / "run", cache_folder, dev_teacher, t5_config, progress=heard)
    assert "6 steps are already done: nothing is left to do" in heard.heard
    assert {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()} == before


def test_a_deterministic_run_uses_deterministic_kernels_and_records_it(tmp_path, cache_folder, dev_teacher, t5_config):
    found = []

    class Watching(Observer):
        def on_checkpoint(self, run: Path, step: int) -> None:
            found.append(torch.are_deterministic_algorithms_enabled())

    run = run_training(
        tmp_path / "run", cache_folder, dev_teacher, t5_config, steps=2, deterministic=True, observers=[Watching()]
    )  # fmt: skip
    assert found == [True] and not torch.are_deterministic_algorithms_enabled()
    assert json.loads((run / "config.json").read_text())["settings"]["deterministic"] is True


@pytest.mark.parametrize("by_default_of_diffusers", [False, True])
def test_a_deterministic_run_has_torchs_own_attention(
    tmp_path, cache_folder, dev_teacher, t5_config, monkeypatch, by_default_of_diffusers
):
    flags = {} if by_default_of_diffusers else {"attention_backend": "_native_math"}
    if by_default_of_diffusers:
        monkeypatch.setattr(attention, "DIFFUSERS_ATTN_BACKEND", "_native_math")
    message = "--deterministic with the attention backend _native_math, expected native: .*; remove one of them"
    with pytest.raises(SettingsError, match=message):
        run_training(tmp_path / "run", cache_folder, dev_teacher, t5_config, deterministic=True, **flags)
    assert not (tmp_path / "run").exists()

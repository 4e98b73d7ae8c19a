"""The clock of the steps divides them without a rest, and a run says at its end where its time went."""

import json
from itertools import accumulate, count

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from secondcast.models.memory.conditions import Conditions
from secondcast.models.memory.modulation_table import make_table
from secondcast.models.memory.options import MemoryOptions
from secondcast.models.student.folder import checkpoints
from secondcast.models.student.student import new_student
from secondcast.storage_schemas.errors import SettingsError
from secondcast.storage_schemas.progress import Silent
from secondcast.storage_schemas.reader import Cache
from secondcast.trainer.cost.stage_cost import Costs, costs_of
from secondcast.trainer.cost.step_flops import step_flops
from secondcast.trainer.cost.summary import (
    TrainingPeakMemory,
    Work,
    flops_text,
    student_forward_flops,
    summarized,
    times_line,
)
from secondcast.trainer.data.mixture import TrainingCache
from secondcast.trainer.run.metrics import Metrics, scalars
from secondcast.trainer.run.timing import PARTS, StageTimes, StepClock
from secondcast.trainer.settings import TrainSettings
from secondcast.trainer.stage import Stage
from secondcast.trainer.training_set import TrainingSet
from tests.models.student.encoders import make_encoder_folder
from tests.trainer.making import CPU, make_trainer


class Ticks:
    """Stamps of a device that is `behind` so many stamps of those that were asked for."""

    def __init__(self, ticks, behind: int = 0) -> None:
        self.ticks, self.behind, self.given = iter(ticks), behind, []

    def now(self) -> int:
        self.given.append(next(self.ticks))
        return self.given[-1]

    def passed(self, stamp: int) -> bool:
        return stamp in self.given[: len(self.given) - self.behind]

    def seconds(self, first: int, second: int) -> int:
        return second - first


def step(clock: StepClock, stage: str, *parts: str) -> None:
    clock.begin()
    for part in parts:
        clock.mark(part)
    clock.end(stage)


@settings(max_examples=50)
@given(
    st.lists(st.lists(st.tuples(st.sampled_from(PARTS), st.integers(1, 99)), min_size=1), min_size=1, max_size=6),
    st.integers(0, 9),
)
def test_the_parts_of_a_step_leave_nothing_of_it_out(steps, behind):
    # A second lies between two steps, which is of neither.
    durations = [duration for marks in steps for duration in (1, *(d for _, d in marks))]
    clock = StepClock(Ticks(accumulate(durations), behind))
    for marks in steps:
        step(clock, "main", *(part for part, _ in marks))
    times = clock.times()["main"]
    counted = steps[2:] or steps
    assert times.steps == len(counted)
    assert times.step_seconds * times.steps == pytest.approx(sum(d for marks in counted for _, d in marks))
    for part, seconds in times.seconds.items():
        assert seconds * times.steps == pytest.approx(sum(d for marks in counted for p, d in marks if p == part))


def test_stages_are_told_apart_and_the_first_steps_of_each_count_only_where_there_are_no_others():
    durations = iter([0, 9, 9, 1, 8, 8, 1, 2, 4, 1, 4, 6, 1, 50, 1, 70])
    clock = StepClock(Ticks(accumulate(durations)), host_seconds=count(step=5).__next__)
    for _ in range(4):
        step(clock, "pretrain", "data_wait", "backward")
    with clock.beside():
        pass
    step(clock, "main", "backbone_forward")
    step(clock, "main", "backbone_forward")
    assert clock.times() == {
        "pretrain": StageTimes(steps=2, seconds={"data_wait": 3, "backward": 5}),
        "main": StageTimes(steps=2, seconds={"backbone_forward": 60}),
    }
    assert clock.beside_seconds == 5


def test_what_a_device_has_not_come_to_is_read_later():
    stamps = Ticks(count(), behind=1)
    clock = StepClock(stamps)
    step(clock, "main", "backward")
    assert len(clock._unread) == 1
    step(clock, "main", "backward")
    # The first has passed by now, the second has not.
    assert len(clock._unread) == 1
    assert clock.times()["main"].steps == 2 and not clock._unread


def test_what_people_are_told():
    stage = Stage(name="main", steps=9, batch_size=4)
    seconds = {"data_wait": 0.0031, "loss": 0.25, "backward": 0.5469}
    times = StageTimes(steps=1200, seconds=seconds)
    assert times_line(stage, times) == (
        "stage main (vision), mean of 1,200 steps: 800 ms, 5 samples/s; data wait 3.1 ms (0 %), loss 250 ms "
        "(31 %), backward 547 ms (68 %)"
    )
    one = StageTimes(steps=1, seconds={"backward": 1.5})
    assert times_line(stage, one, 4) == (
        "stage main (vision), mean of 1 step in the first of 4 processes: 1,500 ms, 2.67 samples/s; backward 1,500 ms "
        "(100 %)"
    )
    assert Work(flops=180e12, matrix_flops=750e12, dtype="bfloat16").text(0.8) == (
        "180 TFLOP per step, 225 TFLOP/s: 30 % of the 750 TFLOP/s of bfloat16 matrix products on this machine"
    )
    assert Work(flops=2.5e9).text(0.5) == "2.5 GFLOP per step, 5 GFLOP/s"
    assert TrainingPeakMemory(host_bytes=2**30, gpu_bytes=None, gpu_reserved_bytes=None).line() == (
        "peak memory: 1.0 GiB on the host"
    )
    assert TrainingPeakMemory(host_bytes=2**30, gpu_bytes=3 * 2**29, gpu_reserved_bytes=2**31).line() == (
        "peak memory: 1.5 GiB on the GPU (2.0 GiB reserved), 1.0 GiB on the host"
    )
    assert [flops_text(value) for value in (0.0, 999.0, 1e3, 31.44e12, 1.2346e16)] == [
        "0 FLOP", "999 FLOP", "1 kFLOP", "31.4 TFLOP", "12,346 TFLOP",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def costs(cache_folder, t5_config) -> Costs:
    return costs_of({"cache": Cache.open(cache_folder).manifest}, str(t5_config))


@pytest.mark.parametrize(
    "memory",
    [{}, {"activation_checkpointing": 2}, {"gpu_blocks": 0}, {"gpu_blocks": 1, "activation_checkpointing": 1}],
)
@pytest.mark.parametrize("stage", [{}, {"timesteps_per_sample": 2}, {"loss": "context"}, {"loss": "embedding"}])
def test_the_flops_of_a_step_are_those_of_the_plan(costs, t5_config, stage, memory):
    one = Stage(name="main", steps=3, batch_size=8, **stage)
    manifest = costs.manifests["cache"]
    student = new_student(str(t5_config), manifest.teacher, init="random", dropout=0.1, seed=0)
    found = step_flops(
        one,
        MemoryOptions(**memory),
        {"cache": (manifest, 18)},
        student_flops=student_forward_flops(student),
        text_length=student.config.text_length,
    )
    settings = TrainSettings(student="any", stages=(one,), **memory)
    # The plan counts the student on the meta device.
    assert found == pytest.approx(costs.step_flops(settings, one), rel=1e-12)


def test_of_blocks_that_are_streamed_those_alone_are_computed_twice(costs):
    cost = costs.backbones["cache"]
    assert [kind.count for kind in cost.kinds] == [1, 2]
    plain = cost.training_flops()
    # Of three blocks the last ones are streamed.
    for resident, streamed in ((3, 0), (2, 1), (1, 2)):
        found = cost.training_flops(MemoryOptions(gpu_blocks=resident))
        assert found == plain + streamed * cost.kinds[1].forward_flops


class Said(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, message: str) -> None:
        self.lines.append(message)


@pytest.mark.thorough
def test_a_run_says_and_records_where_its_time_went(tmp_path, cache_folder, dev_teacher, t5_config, costs):
    flags = {
        "pretrain_steps": 1,
        "steps": 3,
        "batch_size": 2,
        "grad_accum_steps": 2,
        "checkpoint_every": 4,
        "replay_check": 0,
    }
    trainer = make_trainer(tmp_path / "run", cache_folder, dev_teacher, t5_config, **flags)
    cache = Cache.open(cache_folder)
    training_caches = [TrainingCache(name="cache", cache=cache, training_set=TrainingSet.of(cache))]
    progress, metrics = Said(), Metrics(tmp_path / "run", say=print)
    with summarized(trainer, training_caches, metrics, progress, counted_from_seconds=0.0):
        trainer.train(progress)
    times, file = trainer.clock.times(), tmp_path / "run/metrics.jsonl"
    pretrain, main = trainer.settings.stages
    assert list(times["pretrain"].seconds) == ["data_wait", "student_forward", "loss", "backward", "optimizer"]
    assert list(times["main"].seconds) == ["data_wait", "student_forward", "backbone_forward", "backward", "optimizer"]
    lines = [line for line in progress.lines if not line.startswith("step ")]
    assert lines[:2] == [times_line(pretrain, times["pretrain"]), times_line(main, times["main"])]
    assert lines[2].startswith("validation, checkpoints and samples: ")
    assert lines[3].startswith("peak memory: ") and lines[3].endswith(" on the host")
    assert lines[4].startswith(f"stage pretrain: {flops_text(costs.step_flops(trainer.settings, pretrain))} per step")
    assert lines[5].startswith(f"stage main: {flops_text(costs.step_flops(trainer.settings, main))} per step")
    assert lines[5].endswith("matrix products on this machine") and len(lines) == 6
    last = json.loads(file.read_text().splitlines()[-1])
    of_main = last["summary"]["stages"]["main"]
    assert last["step"] == 3 and (of_main["loss"], of_main["timed_steps"]) == ("vision", 1)
    assert of_main["step_flop"] == costs.step_flops(trainer.settings, main)
    assert of_main["part_of_matrix_rate"] == pytest.approx(
        of_main["step_flop"] / of_main["step_seconds"] / of_main["matrix_flop_per_second"], rel=1e-2
    )
    assert of_main["backbone_forward_seconds"] == round(times["main"].seconds["backbone_forward"], 6)
    assert last["summary"]["validation_and_checkpoints_seconds"] == round(trainer.clock.beside_seconds, 3)
    assert last["summary"]["peak_gpu_bytes"] is None and scalars(last) == {}
    # The run goes on from its last checkpoint, and what it said of itself stays.
    metrics.truncate_after(4)
    assert json.loads(file.read_text().splitlines()[-1]) == last


def test_a_run_that_is_stopped_says_its_times_and_a_short_one_counts_nothing(
    tmp_path, cache_folder, t5_config, dev_teacher, monkeypatch
):
    trainer = make_trainer(tmp_path / "run", cache_folder, dev_teacher, t5_config, steps=0, pretrain_steps=1)
    progress, metrics = Said(), Metrics(tmp_path / "run", say=print)
    with pytest.raises(KeyboardInterrupt), summarized(trainer, [], metrics, progress):
        trainer.timed_steps()
        raise KeyboardInterrupt
    told = [line.split(",")[0] for line in progress.lines]
    assert told[0] == "stage pretrain (context)" and told[1].startswith("peak memory") and len(told) == 3
    assert told[2] == "stopped after step 0 of 1; there is no checkpoint yet"
    progress.lines.clear()
    with summarized(trainer, [], metrics, progress):
        pass
    assert [line.split(",")[0] for line in progress.lines] == told[:2]


def test_of_another_encoder_the_flops_are_counted_too(tmp_path, cache_folder):
    teacher = Cache.open(cache_folder).manifest.teacher
    student = new_student(str(make_encoder_folder(tmp_path / "bert")), teacher, init="random", dropout=0.1, seed=0)
    linears = [module for module in student.modules() if isinstance(module, torch.nn.Linear)]
    of_linears = 2 * student.config.text_length * sum(linear.weight.numel() for linear in linears)
    # And the two products of attention.
    assert of_linears < student_forward_flops(student) < 1.5 * of_linears


class Reads(TorchDispatchMode):
    """Counts what would wait for a device: numbers that the host asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(name in str(func) for name in ("_local_scalar_dense", "nonzero", "masked_select", "equal.default")):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "options", [{"modulation": "precomputed", "timestep_weighting": "sigma"}, {"timesteps_per_sample": 2}]
)
def test_nothing_between_batch_and_gradient_waits_for_the_device(
    tmp_path, cache_folder, dev_teacher, t5_config, options
):
    trainer = make_trainer(tmp_path / "run", cache_folder, dev_teacher, t5_config, dropout=0.1, **options)
    with (
        trainer.dataset.prefetch(trainer.plan.requests(0)) as batches,
        trainer.objective.conditions_checked_at_the_end(),
    ):
        batch = next(batches)
        with Reads() as reads:
            trainer._gradients(trainer.settings.at(0), 0, batch)
        assert reads.names == []


def test_a_step_with_conditions_that_the_table_does_not_hold_is_in_no_checkpoint(
    tmp_path, cache_folder, dev_teacher, t5_config
):
    trainer = make_trainer(tmp_path / "run", cache_folder, dev_teacher, t5_config, modulation="gpu", steps=1)
    backbone = trainer.objective.backbones[0]
    backbone.table = make_table(backbone.transformer, Conditions(pairs=((0.25, 3.5),), batch_rows=8), CPU)
    with pytest.raises(
        SettingsError, match=r"^row 0 of a batch has timestep .* the modulation table has timesteps 0\.25"
    ):
        trainer.train(Silent())
    assert checkpoints(tmp_path / "run") == []

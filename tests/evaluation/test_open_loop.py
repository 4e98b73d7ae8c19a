"""Errors on held-out records: the replay error is exact, the numbers are training's, their parts make up the whole."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secondcast.evaluation.held_out import HeldOut, held_out_trajectories, spread
from secondcast.evaluation.on_cache import evaluate_on_cache
from secondcast.evaluation.replaying import filled_batches
from secondcast.evaluation.results import Computed, Evaluated, Evaluation, StepErrors
from secondcast.evaluation.settings.cache_scoring import CacheScoring
from secondcast.evaluation.tables.aggregates import open_loop_summary
from secondcast.models.student.student import load_student
from secondcast.storage_schemas.errors import NonFiniteError
from secondcast.storage_schemas.progress import Silent
from secondcast.storage_schemas.reader import Cache
from secondcast.trainer.losses.validation import measure_replay_error, validation_loss
from tests.evaluation.recorded import CPU, ROWS, STEPS, build_recorded, replayed
from tests.trainer.making import make_trainer

OPEN = {"closed_loop": 0, "batch_size": ROWS}


def evaluated(student, cache, teacher, **flags) -> Evaluation:
    chosen = CacheScoring.from_flags(**OPEN | flags)
    return evaluate_on_cache(student, Cache.open(cache), replayed(teacher), chosen, device=CPU, progress=Silent())


@pytest.mark.thorough
@pytest.mark.parametrize("form", ["zarr", "webdataset"])
def test_the_replay_error_is_exactly_zero_on_a_cache_that_was_recorded_here(
    tmp_path, student, recorded, dev_teacher, form
):
    cache = build_recorded(tmp_path / "c", dev_teacher, format=form)
    found = evaluated(student, cache, dev_teacher)
    assert not np.any(found.replay_error.error_fraction) and not np.any(found.replay_error.mean_square)
    assert np.array(found.errors.error_fraction).shape == (8, STEPS) and np.all(np.array(found.errors.mean_square) > 0)
    # Formats and the batches around a row change no bit of it.
    assert found.errors == evaluated(student, recorded, dev_teacher).errors


@pytest.mark.thorough
def test_errors_are_the_validation_loss_and_the_replay_error_of_training(tmp_path, student, recorded, dev_teacher):
    found = evaluated(student, recorded, dev_teacher, backbone_dtype="bfloat16")
    every = 8 * STEPS
    trainer = make_trainer(
        tmp_path / "r", recorded, dev_teacher, student, batch_size=ROWS, validate_rows=every, backbone_dtype="bfloat16"
    )
    network, dataset = load_student(student), trainer.held_out
    losses = validation_loss(trainer.objective, dataset, lambda ids: network(ids)[0], rows=every)
    places = {one.index: place for place, one in enumerate(held_out_trajectories(Cache.open(recorded)))}
    rows = [(places[dataset.trajectory_of(position)[1]], k) for position, k in losses.rows]
    assert len(set(rows)) == every
    assert [found.errors.mean_square[place][k] for place, k in rows] == losses.values
    replay_error = measure_replay_error(trainer.objective, dataset, rows=every)
    assert replay_error.error > 0
    assert np.mean(found.replay_error.mean_square) == pytest.approx(replay_error.error, rel=1e-12)
    assert {str(k): np.mean(column) for k, column in enumerate(zip(*found.replay_error.mean_square, strict=True))} == (
        pytest.approx(replay_error.by_step, rel=1e-12)
    )


def test_a_relative_error_is_the_norm_of_the_difference_per_norm_of_the_velocity(student, recorded, dev_teacher):
    found = evaluated(student, recorded, dev_teacher, num_trajectories=3, timesteps=(2, 0))
    cache = Cache.open(recorded)
    assert found.steps == (0, 2) and len(found.trajectories) == 3
    for row, one in enumerate(found.trajectories):
        trajectory = cache.trajectory(cache.key_index(one.key))
        assert (one.guidance, one.prompt) == (trajectory.guidance, cache.prompts[trajectory.prompt].text)
        for column, k in enumerate(found.steps):
            velocity = trajectory.velocity_KSC[k].astype(np.float64)
            difference = np.sqrt(found.errors.mean_square[row][column] * velocity.size)
            expected = difference / np.linalg.norm(velocity)
            assert found.errors.error_fraction[row][column] == pytest.approx(expected, rel=1e-5)


@pytest.mark.thorough
def test_fewer_steps_and_trajectories_are_a_part_of_all_bit_for_bit(student, recorded, dev_teacher):
    whole = evaluated(student, recorded, dev_teacher)
    part = evaluated(student, recorded, dev_teacher, num_trajectories=3, timesteps=(1,))
    keys = [one.key for one in whole.trajectories]
    assert {one.sources for one in part.trajectories} == {("few",), ("many",)}
    for one, row in zip(part.trajectories, part.errors.mean_square, strict=True):
        assert row == (whole.errors.mean_square[keys.index(one.key)][1],)


@pytest.mark.parametrize("flags", [{"modulation": "gpu"}, {"gpu_blocks": 1}])
def test_options_of_memory_change_no_bit(student, recorded, dev_teacher, flags):
    few = {"num_trajectories": 2, "timesteps": (0, 1)}
    plain, other = (evaluated(student, recorded, dev_teacher, **few | more) for more in ({}, flags))
    assert (plain.errors, plain.replay_error) == (other.errors, other.replay_error)


@pytest.mark.thorough
def test_pooled_vectors_are_those_that_were_recorded(tmp_path, student, dev_teacher):
    cache = build_recorded(tmp_path / "c", dev_teacher, pooled="clip", held_out=4, trained=0)
    assert not np.any(evaluated(student, cache, dev_teacher, num_trajectories=2).replay_error.error_fraction)


@pytest.mark.slow
def test_a_cache_on_an_object_store_is_evaluated_as_one_here(tmp_path, s3, student, recorded, dev_teacher):
    where = build_recorded(f"{s3.url}/c", dev_teacher, prompts=tmp_path)
    assert evaluated(student, where, dev_teacher).errors == evaluated(student, recorded, dev_teacher).errors


def test_a_prediction_that_is_no_number_is_refused_by_name(student, recorded, dev_teacher, monkeypatch):
    def overflowed(self, index, read=Cache.trajectory):
        found = read(self, index)
        found.velocity_KSC[1] = np.inf
        return found

    monkeypatch.setattr(Cache, "trajectory", overflowed)
    with pytest.raises(
        NonFiniteError, match=r"of student at step 1 of trajectory \w{32}-0000 is not finite \(\d+ of 24 are not\): "
    ):
        evaluated(student, recorded, dev_teacher)


@pytest.mark.slow
def test_quantized_weights_are_those_of_the_recording_unless_others_are_asked_for(tmp_path, student, dev_teacher):
    pytest.importorskip("bitsandbytes")
    cache = build_recorded(tmp_path / "c", dev_teacher, trained=0, held_out=4, quantize="nf4")
    as_recorded = evaluated(student, cache, dev_teacher)
    assert as_recorded.computed.quantize == "nf4" and not np.any(as_recorded.replay_error.error_fraction)
    exact = evaluated(student, cache, dev_teacher, quantize="none")
    assert exact.computed.quantize == "none" and np.all(np.array(exact.replay_error.error_fraction) > 0)


def chosen_of(sources: list[str], guidance: list[float]) -> list[HeldOut]:
    return [
        HeldOut(index=i, key=f"{i * 7919 % 997:04d}", prompt=i, text=str(i), sources=(source,), guidance=value)
        for i, (source, value) in enumerate(zip(sources, guidance, strict=True))
    ]


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from([2.0, 3.5])), min_size=1), st.integers(1, 120))
def test_a_choice_holds_each_source_and_guidance_in_proportion(groups, count):
    everything = chosen_of(*map(list, zip(*groups, strict=True)))
    places = spread(everything, count)
    taken = min(count, len(everything))
    assert len(places) == len(set(places)) == taken and places == sorted(places)
    for group in set(groups):
        share = groups.count(group) * taken / len(groups)
        assert abs(sum(groups[place] == group for place in places) - share) < 1


@given(st.lists(st.integers(), min_size=1, unique=True), st.integers(1, 9))
def test_every_batch_is_full_and_every_item_is_kept_once(items, size):
    batches = list(filled_batches(items, size))
    assert {len(batch) for batch, _ in batches} == {size}
    assert [item for batch, kept in batches for item in batch[:kept]] == items


COLUMNS = st.floats(1e-3, 10)


@st.composite
def evaluations(draw) -> Evaluation:
    steps, rows = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    values = st.lists(st.lists(COLUMNS, min_size=steps, max_size=steps), min_size=rows, max_size=rows)
    errors = StepErrors(error_fraction=draw(values), mean_square=draw(values))
    replay_error = draw(st.none() | st.builds(StepErrors, error_fraction=values, mean_square=values))
    one = st.builds(
        Evaluated,
        key=st.just("k"),
        prompt=st.sampled_from(["x", "y", "z"]),
        sources=st.sampled_from([("a",), ("b",)]),
        guidance=st.sampled_from([2.0, 3.5]),
    )
    return Evaluation(
        created_by="t", student="s", student_digest="d", cache="c", sampling_digest="d", teacher_digest="d",
        backbone="b", committed=rows, held_out=rows, steps=tuple(range(steps)), sigmas=(0.5,) * steps,
        computed=Computed(dtype="float32", quantize="none", attention="a", device="cpu", batch_size=1, torch="2"),
        trajectories=draw(st.lists(one, min_size=rows, max_size=rows)), errors=errors, replay_error=replay_error,
        closed_loop=None,
    )  # fmt: skip


@settings(max_examples=50)
@given(evaluations())
def test_steps_sources_and_guidance_each_make_up_the_whole(evaluation):
    found = open_loop_summary(evaluation, hardest=10)
    overall = found["overall"]
    assert overall["error_fraction"] == pytest.approx(np.mean(evaluation.errors.error_fraction))
    for by in ("by_step", "by_source", "by_guidance", "hardest_prompts"):
        counts = [group["records"] for group in found[by]]
        assert sum(counts) == overall["records"] == len(evaluation.trajectories) * len(evaluation.steps)
        for name in ("error_fraction", "replay_error_fraction", "error_mean_square", "replay_error_mean_square"):
            if overall[name] is not None:
                assert np.average([group[name] for group in found[by]], weights=counts) == pytest.approx(overall[name])
    hardest = [group["error_fraction"] for group in found["hardest_prompts"]]
    assert hardest == sorted(hardest, reverse=True)
    if evaluation.replay_error is not None:
        assert overall["error_per_replay_error_ratio"] == pytest.approx(
            overall["error_fraction"] / overall["replay_error_fraction"]
        )

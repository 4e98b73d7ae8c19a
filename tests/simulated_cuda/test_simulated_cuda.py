"""FLUX.1-dev at full size on a simulated CUDA device: placement, synchronisation, memory. Needs no GPU."""

import pytest

from tests.simulated_cuda.runner import Runner
from tests.simulated_cuda.runs.rows import (
    BROKEN,
    HOST_INPUT,
    READ_AND_ACTIVATIONS,
    ROWS,
    TrainingRow,
)

LARGEST_DIFFERENCE = 0.03
BY_NAME = {row.name: (group, row) for group, rows in ROWS.items() for row in rows}
TRAINING = [name for name, (_, row) in BY_NAME.items() if isinstance(row, TrainingRow)]


def difference(found: dict) -> float:
    """Of the plan from what was allocated."""
    return found["planned"]["gib"] / found["measured"]["allocated_gib"] - 1


@pytest.mark.slow
@pytest.mark.parametrize("name", BY_NAME)
def test_all_tensors_are_on_the_right_device_and_fit_the_gpu_of_the_plan(simulation: Runner, name: str):
    # The allocator raises OutOfMemoryError where the GPU has too little for what is reserved.
    assert simulation.group(BY_NAME[name][0])[name]["error"] is None


@pytest.mark.slow
@pytest.mark.parametrize("name", BY_NAME)
def test_the_plan_is_what_is_allocated(simulation: Runner, name: str):
    found = simulation.group(BY_NAME[name][0])[name]
    assert difference(found) == pytest.approx(0, abs=LARGEST_DIFFERENCE)


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINING)
def test_a_training_step_waits_once_for_the_device(simulation: Runner, name: str):
    waits = simulation.group(BY_NAME[name][0])[name]["measured"]["waits"]
    assert list(waits.values()) == [1], waits


@pytest.mark.slow
def test_an_input_of_the_transformer_on_the_host_is_noticed(simulation: Runner):
    error = simulation.group("training")[HOST_INPUT]["error"]
    assert error.startswith("FakeTensorDeviceMismatchError: Expected all tensors to be on the same device")


@pytest.mark.slow
def test_a_second_host_read_is_noticed(simulation: Runner):
    waits = simulation.group("training")[READ_AND_ACTIVATIONS]["measured"]["waits"]
    assert list(waits.values()) == [1, 1], waits


@pytest.mark.slow
def test_ten_percent_more_activations_are_noticed(simulation: Runner):
    found = simulation.group("training")
    broken = found[BROKEN.name] | {"measured": found[READ_AND_ACTIVATIONS]["measured"]}
    assert difference(broken) < -LARGEST_DIFFERENCE

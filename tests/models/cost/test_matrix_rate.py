"""The rate of matrix products is measured in bounded time, once."""

import torch

from secondcast.models.cost.matrix_rate import matrix_rate

CPU = torch.device("cpu")


def test_without_any_time_there_is_still_a_rate_and_no_larger_matrix_is_begun():
    # Of the second size there could not even be the matrices.
    rate = matrix_rate(CPU, torch.float32, sides=(16, 10**7), limit_seconds=0.0)
    assert rate > 0
    assert matrix_rate(CPU, torch.float32, sides=(16, 10**7), limit_seconds=0.0) == rate


def test_the_random_numbers_of_a_run_are_left_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    matrix_rate(CPU, torch.bfloat16, sides=(8,), limit_seconds=0.0)
    assert torch.equal(torch.rand(3), expected)

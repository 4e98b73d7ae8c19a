"""The exponential moving average of a student's parameters."""

import copy

import torch

from models.student import Student


class Average:
    """A second student, fp32, in eval mode, that follows the first.

    The decay of optimizer step n (from 0) is (1 + n) / (10 + n) as long as that is less than `decay`, so that a short
    run does not average the student it began with.
    """

    def __init__(self, student: Student, decay: float) -> None:
        self.student = copy.deepcopy(student).eval().requires_grad_(False)
        self._decay = decay

    @torch.no_grad()
    def update(self, student: Student, step: int) -> None:
        """Take in the parameters after optimizer step `step` (from 0): average += (1 - d) (parameters - average)."""
        decay = min(self._decay, (1 + step) / (10 + step))
        averages, values = list(self.student.parameters()), list(student.parameters())
        torch._foreach_lerp_(averages, values, 1 - decay)

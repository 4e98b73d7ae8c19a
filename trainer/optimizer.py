"""AdamW on the student's fp32 parameters, its learning rate by step, and the EMA of the weights."""

import copy
import math
from collections.abc import Iterator, Mapping

import torch

from secondcast.models.student.student import Student
from secondcast.trainer.distributed.sharding import held_as
from secondcast.trainer.settings import StepOfStage, TrainSettings
from secondcast.trainer.stage import Stage

_POSITION_BIAS = "relative_attention_bias"
_SHORT_RISE = 20


def make_optimizer(student: Student, settings: TrainSettings) -> torch.optim.AdamW:
    """AdamW over the student alone; weight decay on the encoder, none on the projection (paper, section 4).

    On a GPU its fused kernel: the other one keeps a temporary copy of all second moments.
    """
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, parameter in student.named_parameters():
        factor = settings.position_bias_lr_scale if _POSITION_BIAS in name else 1.0
        decay = settings.weight_decay if name.startswith("encoder.") else 0.0
        groups.setdefault((factor, decay), []).append(parameter)
    return torch.optim.AdamW(
        [{"params": p, "weight_decay": decay, "factor": factor} for (factor, decay), p in groups.items()],
        # Set before every step, see set_learning_rate.
        lr=settings.stages[0].learning_rate,
        fused=True if student.device.type == "cuda" else None,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, at: StepOfStage) -> float:
    """Set the learning rate of an optimizer step and return it."""
    rate = learning_rate(at.stage, at.position)
    for group in optimizer.param_groups:
        group["lr"] = rate * group["factor"]
    return rate


def learning_rate(stage: Stage, position: int) -> float:
    """Learning rate at a step of a stage, from 0: linear warm-up, then constant, or cosine or linear decay to zero."""
    rise_steps = stage.lr_warmup_steps
    if rise_steps is None:
        rise_steps = 0 if stage.lr_schedule == "constant" else _SHORT_RISE
    rise = min(1.0, (position + 1) / rise_steps) if rise_steps else 1.0
    if stage.lr_schedule == "constant":
        return stage.learning_rate * rise
    if stage.lr_schedule == "linear":
        return stage.learning_rate * rise * (1 - position / stage.length)
    return stage.learning_rate * rise * 0.5 * (1 + math.cos(math.pi * position / stage.length))


def optimizer_tensors(student: Student, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, torch.Tensor]]:
    """The state of an optimizer, by key and name of the parameter."""
    for name, parameter in student.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            yield f"{key}/{name}", value


def restore_optimizer(student: Student, optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put back the state of a checkpoint; tensors: by key and name of the parameter."""
    parameters = dict(student.named_parameters())
    for entry, value in tensors.items():
        key, name = entry.split("/", 1)
        parameter = parameters[name]
        # AdamW keeps its step count on the host, but for its fused kernel.
        counted = value.to(parameter.device) if optimizer.defaults["fused"] else value
        optimizer.state[parameter][key] = counted if key == "step" else held_as(value, parameter)


class EMA:
    """Exponential moving average of a student's weights, as a second student, fp32, in eval mode.

    The decay of optimizer step n (from 0) is (1 + n) / (10 + n) while that is less than `decay`, so that the initial
    weights have no lasting influence in a short run.
    """

    def __init__(self, student: Student, decay: float) -> None:
        self.student = copy.deepcopy(student).eval().requires_grad_(False)
        self._decay = decay

    @torch.no_grad()
    def update(self, student: Student, step: int) -> None:
        """Update after optimizer step `step` (from 0): average += (1 - d) (parameters - average)."""
        decay = min(self._decay, (1 + step) / (10 + step))
        averages, values = list(self.student.parameters()), list(student.parameters())
        torch._foreach_lerp_(averages, values, 1 - decay)

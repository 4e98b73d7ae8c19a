"""Ways to break a training step that the simulation has to notice."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch

from secondcast.models.backbone import Backbone
from secondcast.trainer.losses.objective import Objective
from tests.simulated_cuda.device import CUDA
from tests.simulated_cuda.measured import GIB
from tests.simulated_cuda.training import TrainingRow

_predict, _training_loss = Backbone.predict, Objective.training_loss
EXTRA = 0.1
"""Activations that `more_activations` adds, as a part of those of the unbroken step."""


@contextmanager
def host_guidance() -> Iterator[None]:
    """Leaves an input of the transformer on the host."""

    def predict(self: Backbone, *inputs: Any, **named: Any) -> torch.Tensor:
        *others, guidance_B = inputs
        return _predict(self, *others, guidance_B.cpu(), **named)

    with patch.object(Backbone, "predict", predict):
        yield


@contextmanager
def loss_read() -> Iterator[None]:
    """Reads the loss on the host before the backward pass."""

    def training_loss(self: Objective, *inputs: Any) -> torch.Tensor:
        loss = _training_loss(self, *inputs)
        assert loss.item()
        return loss

    with patch.object(Objective, "training_loss", training_loss):
        yield


@contextmanager
def more_activations() -> Iterator[None]:
    """Saves more for the backward pass."""
    extra_bytes = int(EXTRA * GIB * TrainingRow(name="unbroken").planned().activations_gib)

    def predict(self: Backbone, hidden_BSC: torch.Tensor, text_BTD: torch.Tensor, *inputs: Any, **named: Any) -> Any:
        return _predict(self, hidden_BSC, _Keeps.apply(text_BTD, extra_bytes), *inputs, **named)

    with patch.object(Backbone, "predict", predict):
        yield


class _Keeps(torch.autograd.Function):
    """Keeps bytes from here in the forward pass to here in the backward pass."""

    @staticmethod
    def forward(ctx: Any, text_BTD: torch.Tensor, extra_bytes: int) -> torch.Tensor:
        ctx.save_for_backward(torch.empty(extra_bytes, dtype=torch.uint8, device=CUDA))
        return text_BTD.clone()

    @staticmethod
    def backward(ctx: Any, gradient_BTD: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient_BTD, None


FAULTS = (
    TrainingRow(name="an input on the host", fault=host_guidance),
    TrainingRow(name="a second host read", fault=loss_read),
    TrainingRow(name="10 % more activations", fault=more_activations),
)

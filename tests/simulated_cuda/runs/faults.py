"""Ways to break a training step that the simulation has to notice."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest.mock import patch

import torch

from secondcast.models.backbone import Backbone
from secondcast.trainer.losses.objective import Objective
from tests.simulated_cuda.device.simulated import CUDA
from tests.simulated_cuda.runs.rows import GIB, TrainingRow

_predict, _training_loss = Backbone.predict, Objective.training_loss
EXTRA = 0.1
"""Activations that `more_activations` adds, as a part of those of the unbroken step."""


@contextmanager
def host_input() -> Iterator[None]:
    """Leaves an input of the transformer on the host."""

    def predict(self: Backbone, *inputs: Any, **named: Any) -> torch.Tensor:
        *others, guidance_B = inputs
        return _predict(self, *others, guidance_B.cpu(), **named)

    with patch.object(Backbone, "predict", predict):
        yield


@contextmanager
def second_host_read() -> Iterator[None]:
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
    extra_bytes = int(EXTRA * GIB * BROKEN.planned().activations_gib)

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


BROKEN = TrainingRow()
FAULTS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "host input": host_input,
    "second host read": second_host_read,
    "more activations": more_activations,
}
"""Contexts in which a step of the row BROKEN goes wrong."""

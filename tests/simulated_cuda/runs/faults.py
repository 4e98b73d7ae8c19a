"""Ways to break a training step that the simulation has to notice."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest.mock import patch

import torch

from secondcast.models.backbone import Backbone
from secondcast.trainer.losses.objective import Objective
from tests.simulated_cuda.device.simulated import CUDA
from tests.simulated_cuda.runs.rows import GIB, HOST_INPUT, READ_AND_ACTIVATIONS, Planned

# Activations that are added, as a part of those of the plan.
_EXTRA = 0.1
_predict, _training_loss = Backbone.predict, Objective.training_loss


def faults(planned: Planned) -> Mapping[str, AbstractContextManager[None]]:
    """Contexts in which a step goes wrong, by name; planned: of the step."""
    extra_bytes = int(_EXTRA * GIB * planned.activations_gib)
    return {HOST_INPUT: _host_input(), READ_AND_ACTIVATIONS: _host_read_and_activations(extra_bytes)}


@contextmanager
def _host_input() -> Iterator[None]:
    """The guidance stays on the host."""

    def predict(self: Backbone, *inputs: Any, **named: Any) -> torch.Tensor:
        *others, guidance_B = inputs
        return _predict(self, *others, guidance_B.cpu(), **named)

    with patch.object(Backbone, "predict", predict):
        yield


@contextmanager
def _host_read_and_activations(extra_bytes: int) -> Iterator[None]:
    """The loss is read before the backward pass, which more bytes are saved for."""

    def training_loss(self: Objective, *inputs: Any) -> torch.Tensor:
        loss = _training_loss(self, *inputs)
        assert loss.item()
        return loss

    def predict(self: Backbone, hidden_BSC: torch.Tensor, text_BTD: torch.Tensor, *inputs: Any, **named: Any) -> Any:
        return _predict(self, hidden_BSC, _Keeps.apply(text_BTD, extra_bytes), *inputs, **named)

    with patch.object(Objective, "training_loss", training_loss), patch.object(Backbone, "predict", predict):
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

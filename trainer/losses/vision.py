"""The vision loss: the frozen backbone's predictions with the student's embedding and the teacher's (paper, eq. 3)."""

from collections.abc import Callable, Sequence
from functools import cache

import torch

from secondcast.models.backbone import Backbone
from secondcast.models.families.encoders.interface import Conditioning
from secondcast.storage_schemas.errors import SettingsError
from secondcast.trainer.data.replay_dataset import Batch
from secondcast.trainer.losses.difference import difference, differences
from secondcast.trainer.stage import StepWeights

LossFunction = Callable[[torch.Tensor, Batch], torch.Tensor]
"""A loss of the user: the backbone's predictions [B, S, C] with the student's embeddings, fp32, and the batch, whose
velocity_BSC are the recorded predictions; the mean over the rows. It takes the place of vision_loss in training."""


def replay(backbone: Backbone, embedding_BTD: torch.Tensor, batch: Batch) -> torch.Tensor:
    """velocity_BSC of the backbone on cached latents with the given embedding."""
    return backbone.predict(*inputs(backbone, embedding_BTD, batch), modulation_BM=batch.modulation_BM)


def inputs(
    backbone: Backbone, embedding_BTD: torch.Tensor, batch: Batch
) -> tuple[torch.Tensor, torch.Tensor, Conditioning, torch.Tensor, torch.Tensor | None]:
    """Latents, embedding, conditioning, timesteps and guidance of a batch, in the dtypes of the backbone's calls."""
    return (
        batch.hidden_states_BSC.to(backbone.dtype),
        embedding_BTD.to(backbone.dtype),
        batch.conditioning,
        batch.timestep_B.to(backbone.timestep_dtype),
        batch.guidance_B,
    )


def vision_loss(
    backbone: Backbone,
    embedding_BTD: torch.Tensor,
    batch: Batch,
    *,
    huber: float | None = None,
    weights_K: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean squared difference, in fp32, of the backbone's prediction and the cached one (paper, equation 3).

    embedding_BTD: the student's, any float dtype, a row for every batch.timesteps_per_sample rows; it is rounded to the
        backbone's.
    weights_K: fp32, multiplies the mean of a row by its step; None leaves the rows alike.
    """
    found_BSC = replay(backbone, _embedding_of_rows(embedding_BTD, batch), batch)
    if weights_K is None:
        return difference(found_BSC, batch.velocity_BSC, huber)
    errors_BSC = differences(found_BSC, batch.velocity_BSC, huber)
    return (weights_K[batch.step_B] * errors_BSC.flatten(1).mean(1)).mean()


def own_loss(backbone: Backbone, embedding_BTD: torch.Tensor, batch: Batch, loss_fn: LossFunction) -> torch.Tensor:
    """The loss by a function of the user; SettingsError unless it is one number with a gradient."""
    loss = loss_fn(replay(backbone, _embedding_of_rows(embedding_BTD, batch), batch).float(), batch)
    if not isinstance(loss, torch.Tensor) or loss.shape or not loss.requires_grad:
        shape = list(loss.shape) if isinstance(loss, torch.Tensor) else None
        found = type(loss).__name__ if shape is None else f"a tensor of shape {shape}"
        found += " without a gradient" if shape == [] else ""
        raise SettingsError(
            f"{function_name(loss_fn)} returned {found}, expected a tensor of one number, computed from the "
            f"predictions: the student is trained by its gradient; return the mean over the batch"
        )
    return loss.float()


def function_name(function: Callable[..., object]) -> str:
    """Module and name of a function; of another callable, such as a torch.nn.Module, those of its class."""
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"


def _embedding_of_rows(embedding_BTD: torch.Tensor, batch: Batch) -> torch.Tensor:
    """The embedding of each row, of which several may be steps of one trajectory."""
    if batch.timesteps_per_sample == 1:
        return embedding_BTD
    return embedding_BTD.repeat_interleave(batch.timesteps_per_sample, dim=0)


def row_errors(backbone: Backbone, embedding_BTD: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Mean squared difference, in fp32, of each row of a batch (whose timesteps_per_sample is 1): [B]."""
    found_BSC = replay(backbone, embedding_BTD, batch)
    return differences(found_BSC, batch.velocity_BSC, None).flatten(1).mean(1)


def timestep_weighting(name: StepWeights, sigmas: Sequence[float]) -> torch.Tensor | None:
    """Weight of step k, [K] fp32 with mean 1; None for uniform, where every step counts alike as in the paper.

    sigma: sigma_k, more for the noisy steps, in which the composition is decided. interval: sigma_k - sigma_{k+1},
    how far the prediction moves the latent: the loss is then a mean over sigma and not over steps.
    """
    if name == "uniform":
        return None
    sigmas_K1 = torch.tensor(sigmas, dtype=torch.float64)
    weights_K = sigmas_K1[:-1] if name == "sigma" else sigmas_K1[:-1] - sigmas_K1[1:]
    return (weights_K / weights_K.mean()).float()


@cache
def weights_on(name: StepWeights, sigmas: tuple[float, ...], device: torch.device) -> torch.Tensor | None:
    """See timestep_weighting; on a device."""
    # Copied once: a copy from memory that is not pinned waits for the device.
    weights_K = timestep_weighting(name, sigmas)
    return None if weights_K is None else weights_K.to(device)

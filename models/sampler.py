"""The sampler: a pure function from noise to a trajectory, with the scheduler's exact arithmetic."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import DPMSolverMultistepScheduler

from secondcast.models.backbone import Backbone
from secondcast.models.families.text import Text
from secondcast.models.schedule import Schedule
from secondcast.models.teacher.controlnet import Control

# predict(x_BSC, timestep_B) -> the velocity_BSC to record and the one that moves the latent, with text, conditioning
# and guidance bound in. Without classifier-free guidance they are the same.
Predict = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def euler_step(x_BSC: torch.Tensor, velocity_BSC: torch.Tensor, dt: torch.Tensor) -> torch.Tensor:
    """x_{k+1}; dt is 0-dim and of the velocity's dtype (as FlowMatchEulerDiscreteScheduler.step rounds it)."""
    return (x_BSC.float() + dt * velocity_BSC).to(velocity_BSC.dtype)


Step = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]
"""k, x_k and the prediction that moves it -> x_{k+1}; to be called for k = 0, 1, .. in this order."""


def steps_of(schedule: Schedule, latent_BSC: torch.Tensor) -> Step:
    """The steps of one batch of trajectories, for latents like this one."""
    if schedule.scheduler is None:
        sigmas = torch.tensor(schedule.sigmas, dtype=torch.float32)
        dt_K = (sigmas[1:] - sigmas[:-1]).to(device=latent_BSC.device, dtype=latent_BSC.dtype)
        return lambda k, x_BSC, moving_BSC: euler_step(x_BSC, moving_BSC, dt_K[k])
    # It keeps the earlier predictions of its batch. Its steps are elementwise, so that packed latents are as good.
    scheduler = DPMSolverMultistepScheduler.from_config(dict(schedule.scheduler))
    scheduler.set_timesteps(schedule.steps, device=latent_BSC.device)

    def step(k: int, x_BSC: torch.Tensor, moving_BSC: torch.Tensor) -> torch.Tensor:
        moved_BSC: torch.Tensor = scheduler.step(moving_BSC, scheduler.timesteps[k], x_BSC, return_dict=False)[0]
        return moved_BSC

    return step


@dataclass(frozen=True, kw_only=True)
class Trajectories:
    """A batch of trajectories: x_0 .. x_{K-1}, v_0 .. v_{K-1} (the conditional ones), x_K."""

    hidden_states_BKSC: torch.Tensor
    velocity_BKSC: torch.Tensor
    final_latent_BSC: torch.Tensor


@torch.no_grad()
def sample(predict: Predict, noise_BSC: torch.Tensor, schedule: Schedule) -> Trajectories:
    """Sample from noise to the final latent, in the dtype of the noise."""
    step = steps_of(schedule, noise_BSC)
    batch, *token = noise_BSC.shape
    # Allocated once: latents and predictions kept one by one between the activations of the steps fragment the GPU's
    # memory, and stacking them at the end would hold them twice.
    hidden_states_BKSC = noise_BSC.new_empty(batch, len(schedule.timesteps), *token)
    velocity_BKSC = torch.empty_like(hidden_states_BKSC)
    x_BSC = noise_BSC
    for k, timestep in enumerate(schedule.timesteps):
        timestep_B = torch.full((batch,), timestep, device=noise_BSC.device, dtype=schedule.timestep_dtype)
        velocity_BSC, moving_BSC = predict(x_BSC, timestep_B)
        hidden_states_BKSC[:, k], velocity_BKSC[:, k] = x_BSC, velocity_BSC
        x_BSC = step(k, x_BSC, moving_BSC)
    return Trajectories(hidden_states_BKSC=hidden_states_BKSC, velocity_BKSC=velocity_BKSC, final_latent_BSC=x_BSC)


def guided(negative_BSC: torch.Tensor, conditional_BSC: torch.Tensor, guidance_B: torch.Tensor) -> torch.Tensor:
    """Negative + guidance * (conditional - negative), rounded as by a pipeline whose guidance scale is a number.

    guidance_B: fp32. Source: Ho and Salimans, arXiv 2207.12598; StableDiffusion3Pipeline.__call__.
    """
    difference_BSC = conditional_BSC - negative_BSC
    # Not guidance_B in the predictions' dtype: a Python number is not rounded to bfloat16.
    moved_BSC = guidance_B.view(-1, 1, 1) * difference_BSC.float()
    return negative_BSC + moved_BSC.to(difference_BSC.dtype)


def bound(
    backbone: Backbone,
    text: Text,
    guidance_B: torch.Tensor | None,
    negative: Text | None = None,
    control: Control | None = None,
) -> Predict:
    """The backbone with text and guidance of a batch.

    guidance_B: fp32; None where the teacher takes none.
    negative: one row, or one of each of the batch, for classifier-free guidance: one call has the negative's rows
        first and then those of the text, as in the pipeline, and the conditional prediction is the one to record.
    control: without a negative prompt: a ControlNet with the control images of the batch.
    """
    if negative is None:

        def predict(x_BSC: torch.Tensor, timestep_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            velocity_BSC = backbone.predict(
                x_BSC, text.embedding_BTD, text.conditioning, timestep_B, guidance_B, control=control
            )
            return velocity_BSC, velocity_BSC

        return predict
    both = text.after(negative)

    def predict_both(x_BSC: torch.Tensor, timestep_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert guidance_B is not None
        twice = (torch.cat([x_BSC, x_BSC]), torch.cat([timestep_B, timestep_B]))
        found_BSC = backbone.predict(twice[0], both.embedding_BTD, both.conditioning, twice[1], None)
        negative_BSC, conditional_BSC = found_BSC.chunk(2)
        return conditional_BSC, guided(negative_BSC, conditional_BSC, guidance_B)

    return predict_both

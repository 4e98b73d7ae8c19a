"""The sampler: a pure function from noise to a trajectory, with the scheduler's exact arithmetic."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from secondcast.models.schedule import Schedule

# predict(x_BSC, timestep_B) -> velocity_BSC, with text, pooled and guidance bound in.
Predict = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def euler_step(x_BSC: torch.Tensor, velocity_BSC: torch.Tensor, dt: torch.Tensor) -> torch.Tensor:
    """x_{k+1}; dt is 0-dim and of the velocity's dtype (as FlowMatchEulerDiscreteScheduler.step rounds it)."""
    return (x_BSC.float() + dt * velocity_BSC).to(velocity_BSC.dtype)


@dataclass(frozen=True, kw_only=True)
class Trajectories:
    """A batch of trajectories: x_0 .. x_{K-1}, v_0 .. v_{K-1}, x_K."""

    hidden_states_BKSC: torch.Tensor
    velocity_BKSC: torch.Tensor
    final_latent_BSC: torch.Tensor


@torch.no_grad()
def sample(predict: Predict, noise_BSC: torch.Tensor, schedule: Schedule) -> Trajectories:
    """Sample from noise to the final latent, in the dtype of the noise."""
    sigmas = torch.tensor(schedule.sigmas, dtype=torch.float32)
    dt_K = (sigmas[1:] - sigmas[:-1]).to(device=noise_BSC.device, dtype=noise_BSC.dtype)
    batch, *token = noise_BSC.shape
    # Allocated once: latents and predictions kept one by one between the activations of the steps fragment the GPU's
    # memory, and stacking them at the end would hold them twice.
    hidden_states_BKSC = noise_BSC.new_empty(batch, len(schedule.timesteps), *token)
    velocity_BKSC = torch.empty_like(hidden_states_BKSC)
    x_BSC = noise_BSC
    for k, timestep in enumerate(schedule.timesteps):
        timestep_B = torch.full((batch,), timestep, device=noise_BSC.device, dtype=schedule.timestep_dtype)
        velocity_BSC = predict(x_BSC, timestep_B)
        hidden_states_BKSC[:, k], velocity_BKSC[:, k] = x_BSC, velocity_BSC
        x_BSC = euler_step(x_BSC, velocity_BSC, dt_K[k])
    return Trajectories(hidden_states_BKSC=hidden_states_BKSC, velocity_BKSC=velocity_BKSC, final_latent_BSC=x_BSC)

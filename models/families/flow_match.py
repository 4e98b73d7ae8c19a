"""The schedule of a flow-matching scheduler: diffusers' own for builds, and for plans the same without torch."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from secondcast.storage_schemas.errors import TeacherError
from secondcast.storage_schemas.schema.fields import DTYPES
from secondcast.storage_schemas.schema.recording import Dtype

if TYPE_CHECKING:
    import torch

    from secondcast.models.schedule import Schedule

# Of FLUX.1's schedulers. One with other keys may do more.
_KEYS = {
    *("base_image_seq_len", "base_shift", "max_image_seq_len", "max_shift"),
    *("num_train_timesteps", "shift", "use_dynamic_shifting"),
}

PlannedSchedule = tuple[tuple[float, ...], tuple[float, ...]]
"""K + 1 sigmas and K timesteps, as in models/schedule.py."""


def check_repeatable(scheduler_config: Mapping[str, Any]) -> None:
    """Raise TeacherError for a flow-matching scheduler with random steps."""
    if scheduler_config.get("stochastic_sampling", False):
        raise TeacherError(
            "the scheduler has stochastic_sampling = true, expected false: its steps cannot be repeated; "
            "download scheduler/ again"
        )


def linear_schedule(
    scheduler_config: dict[str, Any], *, steps: int, mu: float, own_sigmas: bool, dtype: "torch.dtype"
) -> "Schedule":
    """Of FlowMatchEulerDiscreteScheduler, which computes the values: linear sigmas, shifted by `mu`.

    own_sigmas: the scheduler's own sigmas, also where its configuration asks for them.
    dtype: of latents and timesteps.

    Source: FluxPipeline.__call__ and Flux2KleinPipeline.__call__ of diffusers.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    from secondcast.models.schedule import Schedule

    check_repeatable(scheduler_config)
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(scheduler_config)
    own = own_sigmas or scheduler_config.get("use_flow_sigmas")
    scheduler.set_timesteps(steps, sigmas=None if own else np.linspace(1.0, 1 / steps, steps), mu=mu)
    # The pipelines: t.expand(B).to(latents.dtype), then / 1000, each rounded to the latents' dtype.
    timesteps_K = scheduler.timesteps.to(dtype) / 1000
    return Schedule(
        sigmas=tuple(scheduler.sigmas.double().tolist()),
        timesteps=tuple(timesteps_K.double().tolist()),
        timestep_dtype=timesteps_K.dtype,
    )


def flow_match_schedule(
    scheduler_config: Mapping[str, Any], *, steps: int, mu: float, own_sigmas: bool, dtype: Dtype
) -> PlannedSchedule | None:
    """What FlowMatchEulerDiscreteScheduler computes for FluxPipeline; None for a scheduler with other options.

    own_sigmas: the scheduler's own sigmas, down to that of its last training step; else linear ones.
    dtype: of the latents.
    """
    if scheduler_config.keys() != _KEYS:
        return None
    training_steps, shift = scheduler_config["num_train_timesteps"], scheduler_config["shift"]
    dynamic = scheduler_config["use_dynamic_shifting"]
    if own_sigmas:
        ends = np.array([training_steps, 1], dtype=np.float32) / training_steps
        first, last = (float(sigma) for sigma in (ends if dynamic else _shifted(ends, shift)))
        sigmas_K = np.linspace(first * training_steps, last * training_steps, steps) / training_steps
    else:
        sigmas_K = np.linspace(1.0, 1 / steps, steps).astype(np.float32)
    sigmas_K = math.exp(mu) / (math.exp(mu) + (1 / sigmas_K - 1)) if dynamic else _shifted(sigmas_K, shift)
    sigmas_K = sigmas_K.astype(np.float32)
    # Rounded to the latents' dtype before and after the division, as FluxPipeline does.
    timesteps_K = (sigmas_K * np.float32(training_steps)).astype(DTYPES[dtype]).astype(np.float32)
    timesteps_K = (timesteps_K / np.float32(1000)).astype(DTYPES[dtype]).astype(np.float32)
    return (*sigmas_K.tolist(), 0.0), tuple(timesteps_K.tolist())


def _shifted(sigmas: Any, shift: float) -> Any:
    return shift * sigmas / (1 + (shift - 1) * sigmas)

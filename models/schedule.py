"""The schedule: sigmas, and the timesteps exactly as the backbone receives them. Computed once, then stored."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from secondcast.storage_schemas.errors import TeacherError
from secondcast.storage_schemas.schema.manifest import ScheduleName

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """K + 1 sigmas (fp32 values) and K timesteps (values of the run's dtype, in [0, 1])."""

    sigmas: tuple[float, ...]
    timesteps: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.sigmas) != len(self.timesteps) + 1:
            raise ValueError(
                f"{len(self.timesteps)} timesteps need {len(self.timesteps) + 1} sigmas, found {len(self.sigmas)}"
            )

    @property
    def steps(self) -> int:
        """K."""
        return len(self.timesteps)


def schedule_of(
    name: ScheduleName, scheduler_config: dict[str, Any], *, steps: int, image_tokens: int, dtype: torch.dtype
) -> Schedule:
    """The schedule by its name in the manifest; `dtype` is that of the latents."""
    make = {"diffusers": pipeline_schedule, "distillt5": reference_schedule}[name]
    return make(scheduler_config, steps=steps, image_tokens=image_tokens, dtype=dtype)


def pipeline_schedule(
    scheduler_config: dict[str, Any], *, steps: int, image_tokens: int, dtype: torch.dtype
) -> Schedule:
    """The schedule of FluxPipeline: linear sigmas, shifted according to the number of image tokens.

    Source: FluxPipeline.__call__ and diffusers' FlowMatchEulerDiscreteScheduler, which computes the values.
    """
    linear = None if scheduler_config.get("use_flow_sigmas") else np.linspace(1.0, 1 / steps, steps)
    return _schedule(scheduler_config, linear, steps=steps, image_tokens=image_tokens, dtype=dtype)


def reference_schedule(
    scheduler_config: dict[str, Any], *, steps: int, image_tokens: int, dtype: torch.dtype
) -> Schedule:
    """The schedule of the paper's script, `set_timesteps(steps, mu=mu)`: the scheduler's own sigmas.

    Assumes that the script passes timesteps as FluxPipeline does (rounded to the latents' dtype, then / 1000, rounded
    again), computes mu from the image tokens, and steps with the same scheduler.
    Source: the training script of DistillT5.
    """
    return _schedule(scheduler_config, None, steps=steps, image_tokens=image_tokens, dtype=dtype)


def _schedule(
    scheduler_config: dict[str, Any], sigmas: np.ndarray | None, *, steps: int, image_tokens: int, dtype: torch.dtype
) -> Schedule:
    from diffusers import FlowMatchEulerDiscreteScheduler

    found = scheduler_config.get("stochastic_sampling", False)
    if found:
        raise TeacherError(
            "the scheduler has stochastic_sampling = true, expected false: its latents cannot be derived"
        )
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(scheduler_config)
    scheduler.set_timesteps(steps, sigmas=sigmas, mu=shift_of(dict(scheduler.config), image_tokens))
    # FluxPipeline: t.expand(B).to(latents.dtype), then / 1000, each rounded to the latents' dtype.
    timesteps_K = scheduler.timesteps.to(dtype) / 1000
    return Schedule(sigmas=tuple(scheduler.sigmas.double().tolist()), timesteps=tuple(timesteps_K.double().tolist()))


def shift_of(scheduler_config: dict[str, Any], image_tokens: int) -> float:
    """`mu` of a scheduler, linear in the number of image tokens.

    Same as FluxPipeline's calculate_shift, without importing the pipeline, which takes seconds.
    """
    fewest, most = scheduler_config.get("base_image_seq_len", 256), scheduler_config.get("max_image_seq_len", 4096)
    low, high = scheduler_config.get("base_shift", 0.5), scheduler_config.get("max_shift", 1.15)
    slope = (high - low) / (most - fewest)
    return float(image_tokens * slope + (low - slope * fewest))

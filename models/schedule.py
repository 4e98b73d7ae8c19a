"""The schedule: sigmas, and the timesteps exactly as the backbone receives them. Computed once, then stored."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """K + 1 sigmas (fp32 values) and K timesteps, values of the dtype in which the backbone receives them.

    scheduler: configuration of the scheduler that makes the steps; None: Euler steps of flow matching.
    """

    sigmas: tuple[float, ...]
    timesteps: tuple[float, ...]
    timestep_dtype: torch.dtype
    scheduler: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if len(self.sigmas) != len(self.timesteps) + 1:
            raise ValueError(
                f"{len(self.timesteps)} timesteps need {len(self.timesteps) + 1} sigmas, found {len(self.sigmas)}"
            )

    @property
    def steps(self) -> int:
        """K."""
        return len(self.timesteps)

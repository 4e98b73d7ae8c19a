"""Open loop: compares each prediction on a cached latent, with a text encoder's embedding, to the cached velocity."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch

from secondcast.evaluation.held_out import HeldOut
from secondcast.evaluation.replaying import Conditions, EmbedPrompts, filled_batches, on_device
from secondcast.evaluation.results import StepErrors
from secondcast.models.backbone import Backbone
from secondcast.models.recorded_backbone import recorded_schedule
from secondcast.storage_schemas.errors import NonFiniteError
from secondcast.storage_schemas.progress import Progress
from secondcast.storage_schemas.reader import Cache
from secondcast.storage_schemas.record import Trajectory
from secondcast.storage_schemas.schema.fields import Array


@dataclass(frozen=True, kw_only=True)
class _Inputs:
    """A batch of cached steps, in the cache's dtype except for the conditions."""

    hidden_states_BSC: torch.Tensor
    velocity_BSC: torch.Tensor
    timestep_B: torch.Tensor
    conditions: Conditions

    @classmethod
    def of(cls, cache: Cache, rows: Sequence[tuple[Trajectory, int]], backbone: Backbone) -> Self:
        latents, velocities = (
            on_device(arrays, backbone.device)
            for arrays in (
                [trajectory.hidden_states_KSC[k] for trajectory, k in rows],
                [trajectory.velocity_KSC[k] for trajectory, k in rows],
            )
        )
        schedule = recorded_schedule(cache.manifest)
        timestep_B = torch.tensor([schedule.timesteps[k] for _, k in rows], dtype=schedule.timestep_dtype)
        return cls(
            hidden_states_BSC=latents,
            velocity_BSC=velocities,
            timestep_B=timestep_B.to(backbone.device),
            conditions=Conditions.of(cache, [trajectory for trajectory, _ in rows], backbone),
        )


@torch.no_grad()
def open_loop(
    cache: Cache,
    backbone: Backbone,
    encoders: Mapping[str, EmbedPrompts],
    trajectories: Sequence[HeldOut],
    steps: Sequence[int],
    *,
    batch_size: int,
    progress: Progress,
) -> dict[str, StepErrors]:
    """The errors of each text encoder, by name, on these steps of these trajectories.

    Every call of a network has batch_size rows. NonFiniteError for an error that is not finite.
    """
    rows = [(number, k) for number in range(len(trajectories)) for k in steps]
    found: dict[str, list[Array]] = {name: [] for name in encoders}
    read: dict[int, Trajectory] = {}
    with progress.bar("open loop", total=len(rows), done=0, unit="records") as bar:
        for batch, kept in filled_batches(rows, batch_size):
            wanted = {number for number, _ in batch}
            read = {
                number: read[number] if number in read else cache.trajectory(trajectories[number].index)
                for number in wanted
            }
            inputs = _Inputs.of(cache, [(read[number], k) for number, k in batch], backbone)
            prompts = [trajectories[number].prompt for number, _ in batch]
            for name, embed in encoders.items():
                found[name].append(_row_errors(backbone, embed(prompts), inputs)[:kept])
            bar.advance(kept)
    shape = (len(trajectories), len(steps))
    return {
        name: _step_errors(np.concatenate(parts).reshape(*shape, 2), name, trajectories, steps)
        for name, parts in found.items()
    }


def _row_errors(backbone: Backbone, embedding_BTD: torch.Tensor, inputs: _Inputs) -> Array:
    """[B, 2] float64: relative error and mean squared difference of each row, differences in fp32."""
    found_BSC = backbone.predict(
        inputs.hidden_states_BSC.to(backbone.dtype),
        embedding_BTD.to(backbone.dtype),
        inputs.conditions.pooled_BP,
        inputs.timestep_B.to(backbone.timestep_dtype),
        inputs.conditions.guidance_B,
    )
    wanted_BSC = inputs.velocity_BSC.float()
    square_BSC = (found_BSC.float() - wanted_BSC).square()
    # The mean as in training, the norms in float64, with one copy to the host for all three.
    columns = torch.stack(
        [
            square_BSC.flatten(1).mean(1).double(),
            square_BSC.flatten(1).sum(1, dtype=torch.float64),
            wanted_BSC.square().flatten(1).sum(1, dtype=torch.float64),
        ],
        dim=1,
    )
    mean_B, error_B, norm_B = columns.cpu().numpy().T
    # A zero velocity gives NaN, which is refused by name.
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.stack([np.sqrt(error_B / norm_B), mean_B], axis=1)


def _step_errors(values_NK2: Array, name: str, trajectories: Sequence[HeldOut], steps: Sequence[int]) -> StepErrors:
    wrong = np.argwhere(~np.isfinite(values_NK2).all(-1))
    if len(wrong):
        number, step = wrong[0]
        raise NonFiniteError(
            f"the error of {name} at step {steps[step]} of trajectory {trajectories[number].key} is not finite "
            f"({len(wrong)} of {values_NK2[..., 0].size} are not): embedding, prediction or recording overflowed; try "
            f"--backbone-dtype float32, and inspect the trajectory with `secondcast inspect show`"
        )
    return StepErrors(error_fraction=values_NK2[..., 0].tolist(), mean_square=values_NK2[..., 1].tolist())

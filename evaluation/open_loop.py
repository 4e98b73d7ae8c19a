"""Open loop: compares each prediction on a cached latent, with a text encoder's embedding, to the cached velocity."""

from collections.abc import Iterator, Mapping, Sequence
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
from secondcast.storage_schemas.record import Trajectory, trajectory_key
from secondcast.storage_schemas.schema.fields import Array


@dataclass(frozen=True, kw_only=True)
class RecordedSteps:
    """A batch of cached steps, in the cache's dtype except for the conditions.

    prompts: the number of each row's prompt.
    """

    prompts: Sequence[int]
    hidden_states_BSC: torch.Tensor
    velocity_BSC: torch.Tensor
    timestep_B: torch.Tensor
    conditions: Conditions

    @classmethod
    def of(cls, cache: Cache, rows: Sequence[tuple[Trajectory, int]], backbone: Backbone) -> Self:
        """Steps k of trajectories, on the backbone's device."""
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
            prompts=[trajectory.prompt for trajectory, _ in rows],
            hidden_states_BSC=latents,
            velocity_BSC=velocities,
            timestep_B=timestep_B.to(backbone.device),
            conditions=Conditions.of(cache, [trajectory for trajectory, _ in rows], backbone),
        )

    def predict(self, backbone: Backbone, embedding_BTD: torch.Tensor) -> torch.Tensor:
        """velocity_BSC on these steps with another embedding."""
        return backbone.predict(
            self.hidden_states_BSC.to(backbone.dtype),
            embedding_BTD.to(backbone.dtype),
            self.conditions.conditioning,
            self.timestep_B.to(backbone.timestep_dtype),
            self.conditions.guidance_B,
        )


def step_batches(
    cache: Cache, backbone: Backbone, records: Sequence[tuple[int, int]], *, batch_size: int
) -> Iterator[tuple[RecordedSteps, int]]:
    """Batches of exactly batch_size records (trajectory index, step), each with its unpadded size."""
    read: dict[int, Trajectory] = {}
    for batch, kept in filled_batches(records, batch_size):
        read = {index: read[index] if index in read else cache.trajectory(index) for index in {i for i, _ in batch}}
        yield RecordedSteps.of(cache, [(read[index], k) for index, k in batch], backbone), kept


@torch.no_grad()
def replay_errors(
    cache: Cache,
    backbone: Backbone,
    encoders: Mapping[str, EmbedPrompts],
    records: Sequence[tuple[int, int]],
    *,
    batch_size: int,
    progress: Progress,
    title: str,
) -> dict[str, Array]:
    """The errors of each text encoder, by name, on these records (trajectory index, step).

    Each is float64 [N, 2]: error relative to the norm of the velocity, and mean squared difference.
    Every call of a network has batch_size rows. NonFiniteError for an error that is not finite.
    """
    found: dict[str, list[Array]] = {name: [] for name in encoders}
    with progress.bar(title, total=len(records), done=0, unit="records") as bar:
        for steps, kept in step_batches(cache, backbone, records, batch_size=batch_size):
            for name, embed in encoders.items():
                found[name].append(_row_errors(backbone, embed(steps.prompts), steps)[:kept])
            bar.advance(kept)
    errors = {name: np.concatenate(parts) for name, parts in found.items()}
    for name, errors_N2 in errors.items():
        _check_finite(errors_N2, name, cache, records)
    return errors


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
    """The errors of each text encoder, by name, on these steps of these trajectories; see replay_errors."""
    records = [(trajectory.index, k) for trajectory in trajectories for k in steps]
    errors = replay_errors(
        cache, backbone, encoders, records, batch_size=batch_size, progress=progress, title="open loop"
    )
    found = {name: values_N2.reshape(len(trajectories), len(steps), 2) for name, values_N2 in errors.items()}
    return {
        name: StepErrors(error_fraction=values_NK2[..., 0].tolist(), mean_square=values_NK2[..., 1].tolist())
        for name, values_NK2 in found.items()
    }


def _row_errors(backbone: Backbone, embedding_BTD: torch.Tensor, steps: RecordedSteps) -> Array:
    """[B, 2] float64: relative error and mean squared difference of each row, differences in fp32."""
    found_BSC = steps.predict(backbone, embedding_BTD)
    wanted_BSC = steps.velocity_BSC.float()
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


def _check_finite(errors_N2: Array, name: str, cache: Cache, records: Sequence[tuple[int, int]]) -> None:
    wrong = np.flatnonzero(~np.isfinite(errors_N2).all(-1))
    if len(wrong):
        index, step = records[wrong[0]]
        place = cache.layout.place(index)
        key = trajectory_key(cache.prompts[place.prompt].id, place.sample_index)
        raise NonFiniteError(
            f"the error of {name} at step {step} of trajectory {key} is not finite "
            f"({len(wrong)} of {len(records)} are not): embedding, prediction or recording overflowed; try "
            f"--backbone-dtype float32, and inspect the trajectory with `secondcast inspect show`"
        )

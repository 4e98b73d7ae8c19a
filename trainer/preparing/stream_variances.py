"""The variances between prompts that the depth loss divides by: measured by the first call of a run, and kept."""

from collections.abc import Sequence

import torch

from secondcast.storage_schemas.progress import Progress, counted
from secondcast.trainer.data.mixture import TrainingCache, split
from secondcast.trainer.distributed.processes import Distributed
from secondcast.trainer.losses.depth import measure_variances
from secondcast.trainer.losses.objective import Objective
from secondcast.trainer.run.config import RunConfig, StreamVariances


def stream_variances(
    objective: Objective,
    training_caches: Sequence[TrainingCache],
    begun: RunConfig | None,
    device: torch.device,
    processes: Distributed,
    progress: Progress,
) -> tuple[StreamVariances, ...]:
    """Those of each depth of a run's stages, the same in all processes: of a run that is resumed, as recorded.

    Raises SettingsError where the streams do not vary.
    """
    settings = objective.settings
    if not settings.depths:
        return ()
    if begun is not None:
        return begun.stream_variances

    def measure() -> list[dict[str, float]]:
        dataset, _ = split(training_caches, device, None, objective.host_modulation)
        rows = max(1, settings.replay_rows // processes.ranks)
        measured = [
            measure_variances(objective.backbones, dataset, depth, batch_rows=rows) for depth in settings.depths
        ]
        return [variances.json_value() for variances in measured]

    found = tuple(StreamVariances(**values) for values in processes.broadcast_from_rank0(measure))
    for one in found:
        progress.say(
            f"variance between prompts after {counted(one.blocks, 'block')}: {one.hidden_states:.4g} of the image "
            f"stream, {one.encoder_hidden_states:.4g} of the text stream; the depth loss is measured in it"
        )
    return found

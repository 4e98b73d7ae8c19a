"""FLOPs of optimizer steps, counted from shapes: what is computed, and what is computed again."""

from collections.abc import Callable, Mapping

import torch

from secondcast.models.memory.meta_run import count_flops
from secondcast.models.memory.options import MemoryOptions
from secondcast.models.student.student import Student
from secondcast.storage_schemas.schema.manifest import Manifest
from secondcast.trainer.loss_kinds import Loss
from secondcast.trainer.losses import context, embedding, vision
from secondcast.trainer.stage import Stage

RowFlops = Callable[[Stage, MemoryOptions, Mapping[str, tuple[Manifest, int]], int], float]
_ROW_FLOPS: Mapping[Loss, RowFlops] = {
    "vision": vision.row_flops,
    "embedding": embedding.row_flops,
    "context": context.row_flops,
}
# Forward, and twice as much for the gradients of weights and of activations.
_TRAINED = 3


@torch.no_grad()
def student_forward_flops(student: Student) -> float:
    """FLOPs of a student's forward pass of one text of its length; it is run once."""
    # Not on the meta device: most encoders of transformers look at the values of their mask.
    token_ids_BT = torch.zeros(1, student.config.text_length, dtype=torch.int64, device=student.device)
    return count_flops(lambda: student(token_ids_BT)).total


def step_flops(
    stage: Stage,
    memory: MemoryOptions,
    caches: Mapping[str, tuple[Manifest, int]],
    *,
    student_flops: float,
    text_length: int,
) -> float:
    """FLOPs of an optimizer step of a stage, of all processes together, over its caches by their shares.

    caches: by name, with the number of trajectories that are trained on.
    student_flops: of a forward pass of one text.
    text_length: of the student.
    """
    row = _ROW_FLOPS[stage.loss](stage, memory, caches, text_length)
    return stage.batch_size * (row + _TRAINED * student_flops / stage.timesteps_per_sample)

"""The embedding loss: the student's embeddings and the teacher's, the paper's "naive" distillation."""

from collections.abc import Mapping

import torch

from secondcast.models.memory.options import MemoryOptions
from secondcast.storage_schemas.schema.manifest import Manifest
from secondcast.trainer.losses.difference import difference
from secondcast.trainer.stage import Stage


def embedding_loss(
    embedding_BTD: torch.Tensor, teacher_BTD: torch.Tensor, *, huber: float | None = None
) -> torch.Tensor:
    """Mean squared difference of embeddings, in fp32: the paper's "naive" distillation; needs no backbone."""
    return difference(embedding_BTD, teacher_BTD, huber)


def row_flops(
    stage: Stage, memory: MemoryOptions, caches: Mapping[str, tuple[Manifest, int]], text_length: int
) -> float:
    """FLOPs of the loss for a row of the batch, the student's own left out: none."""
    return 0.0

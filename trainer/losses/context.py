"""The context loss: embeddings as the backbone reads them, after its text projection."""

from collections.abc import Mapping

import torch
from torch.nn.functional import linear

from secondcast.models.memory.options import MemoryOptions
from secondcast.storage_schemas.schema.manifest import Manifest
from secondcast.trainer.losses.difference import difference
from secondcast.trainer.stage import Stage


def context_loss(
    embedding_BTD: torch.Tensor, teacher_BTD: torch.Tensor, weight_ID: torch.Tensor, *, huber: float | None = None
) -> torch.Tensor:
    """The embedding error as the backbone sees it: after its text projection, weight_ID in fp32 (I its inner width).

    What the projection maps to zero costs nothing. Its bias falls out of the difference.
    """
    return difference(linear(embedding_BTD.float(), weight_ID), linear(teacher_BTD.float(), weight_ID), huber)


def row_flops(
    stage: Stage, memory: MemoryOptions, caches: Mapping[str, tuple[Manifest, int]], text_length: int
) -> float:
    """FLOPs of the loss for a row of the batch, the student's own left out."""
    teacher = next(iter(caches.values()))[0].teacher
    inner = int(teacher.backbone_config["attention_head_dim"]) * int(teacher.backbone_config["num_attention_heads"])
    # The linear on the student's and on the teacher's embedding, and the gradient towards the student's.
    return 3 * 2.0 * text_length * teacher.text_width * inner

"""The context loss: embeddings as the backbone reads them, after its text projection."""

import torch
from torch.nn.functional import linear

from secondcast.trainer.losses.difference import difference


def context_loss(
    embedding_BTD: torch.Tensor, teacher_BTD: torch.Tensor, weight_ID: torch.Tensor, *, huber: float | None = None
) -> torch.Tensor:
    """The embedding error as the backbone sees it: after its text projection, weight_ID in fp32 (I its inner width).

    What the projection maps to zero costs nothing. Its bias falls out of the difference.
    """
    return difference(linear(embedding_BTD.float(), weight_ID), linear(teacher_BTD.float(), weight_ID), huber)

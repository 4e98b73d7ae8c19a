"""The embedding loss: the student's embeddings and the teacher's, the paper's "naive" distillation."""

import torch

from secondcast.trainer.losses.difference import difference


def embedding_loss(
    embedding_BTD: torch.Tensor, teacher_BTD: torch.Tensor, *, huber: float | None = None
) -> torch.Tensor:
    """Mean squared difference of embeddings, in fp32: the paper's "naive" distillation; needs no backbone."""
    return difference(embedding_BTD, teacher_BTD, huber)

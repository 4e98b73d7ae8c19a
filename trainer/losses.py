"""The losses: the paper's (replay through the frozen backbone), and the embedding error of its warm-up."""

import torch
from torch.nn.functional import mse_loss

from models.backbone import FluxBackbone
from trainer.feed import Batch


def vision_loss(backbone: FluxBackbone, embedding_BTD: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Mean squared difference, in fp32, of the backbone's prediction and the cached one (paper, equation 3).

    embedding_BTD: the student's, any float dtype; it is rounded to the backbone's.
    """
    return mse_loss(replay(backbone, embedding_BTD, batch).float(), batch.velocity_BSC.float())


def replay(backbone: FluxBackbone, embedding_BTD: torch.Tensor, batch: Batch) -> torch.Tensor:
    """velocity_BSC of the backbone on cached latents with the given embedding."""
    return backbone.predict(
        batch.hidden_states_BSC.to(backbone.dtype),
        embedding_BTD.to(backbone.dtype),
        batch.pooled_BP.to(backbone.dtype),
        batch.timestep_B.to(backbone.dtype),
        batch.guidance_B,
    )


def embedding_loss(embedding_BTD: torch.Tensor, teacher_BTD: torch.Tensor) -> torch.Tensor:
    """Mean squared difference of embeddings, in fp32: the paper's "naive" distillation; needs no backbone."""
    return mse_loss(embedding_BTD.float(), teacher_BTD.float())

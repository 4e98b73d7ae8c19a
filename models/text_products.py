"""Vector-Jacobian products of the prediction with respect to the text embedding: what the transformer reads in it."""

from collections.abc import Callable, Sequence

import torch

Predict = Callable[[torch.Tensor], torch.Tensor]
"""encoder_hidden_states_BTD -> velocity_BSC, all else fixed."""


def text_products(
    predict: Predict, embedding_BTD: torch.Tensor, normals_PBSC: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """J^T r of each row, [B, T, D] fp32, for each r: J is the derivative of the row's prediction by its embedding.

    One forward pass serves all products. Rows do not mix: each has an embedding of its own.
    """
    embedding_BTD = embedding_BTD.detach().requires_grad_(True)
    with torch.enable_grad():
        velocity_BSC = predict(embedding_BTD)
    last = len(normals_PBSC) - 1
    return [
        torch.autograd.grad(velocity_BSC, embedding_BTD, normal_BSC.to(velocity_BSC), retain_graph=number < last)[0]
        for number, normal_BSC in enumerate(normals_PBSC)
    ]
